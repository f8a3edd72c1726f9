"""What several workers make of a round's time and memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from raftune.config.load import merge, validate
from raftune.planning.forecast import amounts
from raftune.planning.sharing import Sharing
from raftune.policies.causal_lm.footprint import ModelFootprint

CORES = os.cpu_count() or 1


def shared(workers: int, chunk_size: int, prompts: int = 64, **engine: Any) -> Sharing:
    base = {"data": {"prompts": "p"}, "policy": {"model": "m"}, "prompts_per_round": prompts}
    changes = {"sampling": {"chunk_size": chunk_size}, "engine": {"workers": workers, "threads": 1, **engine}}
    config = validate(merge([base, changes]))
    return Sharing.of(config, amounts(config, prompts, 4), "cpu")


@pytest.mark.parametrize(
    ("workers", "chunk_size", "times"), [(1, 16, 1), (4, 16, 4), (4, 64, 1), (4, 13, 2.5), (3, 16, 2)]
)
def test_workers_on_other_nodes_are_as_fast_as_the_one_with_the_most_chunks(
    workers: int, chunk_size: int, times: float
) -> None:
    assert shared(workers, chunk_size, launch=["srun"]).times == times


def test_workers_here_are_no_faster_than_there_are_cores() -> None:
    assert shared(CORES + 1, 1).times == pytest.approx(CORES, rel=0.5)
    assert shared(2, 1, threads=CORES).times == 1


def test_memory_is_that_of_all_workers_here_and_of_one_elsewhere() -> None:
    assert shared(CORES, 1).describe(10**9).endswith(f"generating, all together: {CORES}.0 GB")
    assert "generating, a worker: 1.0 GB" in shared(4, 1, launch=["srun"]).describe(10**9)


def test_shards_hold_their_part_of_weights_gradients_and_moments() -> None:
    model = ModelFootprint("Llama", 1000, 1000, "float32", 4, 64, 4, 100, 128, "cpu")
    changes = {"training": {"processes": 2, "parallel": "fsdp"}}
    config = validate(merge([{"data": {"prompts": "p"}, "policy": {"model": "m"}}, changes]))
    sharded = Sharing.of(config, amounts(config, 64, 4), "cpu")
    whole = replace(sharded, parallel="ddp")
    assert whole.describe_training(20_000, model).endswith(
        "each with the whole model; training, all together: 40.0 kB at most"
    )
    on_gpus = replace(sharded, gpus=2)
    assert on_gpus.describe_training(20_000, model).endswith("a shard of the model; training, a GPU: 12.0 kB at most")
    assert (on_gpus.training_times, sharded.training_times) == (2, 1)


def test_idle_workers_and_shared_cores_are_noted_with_the_fix() -> None:
    config = validate({"data": {"prompts": "p"}, "policy": {"model": "m"}, "engine": {"workers": 4, "threads": CORES}})
    notes = Sharing.of(config, amounts(config, 64, 4), "cpu").remarks(config, 64)
    assert "3 workers will have nothing to do. Write sampling.chunk_size: 16" in notes[0]
    assert notes[1].endswith(f"write engine.threads: {max(1, CORES // 4)}")
