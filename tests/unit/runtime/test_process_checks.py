"""Who trains which rows when several processes do, and what of their configuration is refused before a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from raftune.config import RunConfig, validate
from raftune.errors import ConfigError
from raftune.policies.registry import family_of
from raftune.runtime import distributed
from raftune.runtime.distributed import check_processes, process_count
from raftune.stages.train import TrainStage
from raftune.store.job import fields_of
from raftune.training.fit import LengthGroupedSampler
from raftune.training.processes import BatchShare, Processes, shares


def config(training: dict[str, Any], **policy: Any) -> RunConfig:
    policy = policy or {"model": "m", "device": "cpu"}
    return validate({"data": {"prompts": "p"}, "policy": policy, "training": training})


def faults(training: dict[str, Any], **policy: Any) -> list[str]:
    given = config(training, **policy)
    return [*check_processes(given, family_of(given))]


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (4, 2, 2, (4, 1)), (8, 1, 2, (4, 1)), (4, 4, 2, (4, 2)), (4, 2, 4, (2, 1)), (6, 4, 6, (2, 2))],
)
def test_micro_batches_are_shared_out_before_they_are_cut(
    rows: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    assert shares(rows, accumulation, processes) == expected
    assert math.prod(expected) * processes == rows * accumulation


@pytest.mark.parametrize(("rows", "accumulation", "world"), [(4, 1, 2), (2, 2, 2), (3, 1, 3), (1, 2, 4)])
@pytest.mark.parametrize("count", [1, 7, 12, 13, 24])
def test_processes_share_each_step_of_one_process_without_repeating_a_row(
    rows: int, accumulation: int, world: int, count: int
) -> None:
    step = rows * accumulation * world
    lengths = [(7 * i) % 11 + 1 for i in range(count)]
    order = LengthGroupedSampler(lengths, step, seed=3)
    parts = [
        BatchShare(LengthGroupedSampler(lengths, step, seed=3), rows, accumulation, Processes(rank, world), count)
        for rank in range(world)
    ]
    for part in (order, *parts):
        part.set_epoch(1)
    batches = [list(part) for part in parts]
    assert {len(part) for part in batches} == {len(part) for part in parts}
    assert len(parts[0]) == len(batches[0])
    for first in range(0, count, step):
        number = first // step * accumulation
        taken = [row for part in batches for batch in part[number : number + accumulation] for row in batch]
        assert sorted(row for row in taken if row != count) == sorted(list(order)[first : first + step])
    assert all(batch == [count] or count not in batch for part in batches for batch in part)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_family_that_trains_in_one_process_is_given_no_others() -> None:
    table = {"family": "tabular", "num_prompts": 2}
    assert faults({"processes": "auto"}, **table) == []
    (words,) = faults({"processes": 2}, **table)
    assert words == (
        "training.processes must be 1 for policy.family: tabular, which trains in one process; got 2. Leave it out, "
        "and start raftune without a launcher."
    )


def test_a_step_that_the_processes_cannot_share_evenly_is_refused_with_what_would_do() -> None:
    (words,) = faults({"processes": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    assert "must be shared evenly by training.processes = 3; got 4 x 2. Set gradient_accumulation_steps: 3" in words
    assert faults({"processes": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}) == []


def test_no_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gpus", lambda config: 2)
    (words,) = faults({"processes": 4})
    assert words.startswith("training.processes must not exceed the GPUs, 2; got 4 here.")
    assert faults({"processes": 2}) == faults({"processes": "auto"}) == []
    assert process_count(config({"processes": "auto"})) == 2


def test_auto_is_one_process_on_a_cpu() -> None:
    assert process_count(config({"processes": "auto"})) == 1
    assert faults({"processes": "auto"}) == []


def test_shards_need_several_processes_and_weights_that_can_be_cut() -> None:
    assert faults({"processes": 2, "parallel": "fsdp"}) == []
    (words,) = faults({"parallel": "fsdp"})
    assert words.endswith("got training.processes = 1. Raise it.")
    quantised = {"model": "m", "device": "cpu", "load_in_4bit": True, "adapter": {}}
    (words,) = faults({"processes": 2, "parallel": "fsdp"}, **quantised)
    assert words.startswith("training.parallel must be ddp with policy.load_in_4bit, which cannot be cut into shards")
    assert faults({"processes": 2}, **quantised) == []
    (words,) = faults({"processes": 2, "parallel": "fsdp", "trainer_kwargs": {"fp16": True}})
    assert "fp16" in words


def test_variables_of_a_launcher_without_a_meeting_place_are_an_error_that_names_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    words = r"a launcher began 2 processes; they did not meet \(.*MASTER_ADDR.*Start all of them with MASTER_ADDR and"
    with pytest.raises(ConfigError, match=words), distributed.launched(config({})):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.launched(config({})):
        assert distributed.launched_processes() == Processes()


@pytest.mark.parametrize("processes", [0, -1, "all"])
def test_processes_are_counted_from_one(processes: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.processes"):
        config({"processes": processes})


def test_a_run_goes_on_with_another_number_of_processes() -> None:
    """The key of a training has neither their number nor how they share the model."""
    keys = []
    for training in ({}, {"processes": 4}, {"processes": "auto", "parallel": "fsdp"}):
        given = config(training)
        stage = TrainStage(None, given.training, Path("train"))  # type: ignore[arg-type]
        keys.append(fields_of(stage, given.model_dump(mode="json")))
    assert keys[0] == keys[1] == keys[2]
