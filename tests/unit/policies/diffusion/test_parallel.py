"""Several batches at once: the same images, in order, and torch's threads as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raftune.errors import OutOfMemory
from raftune.policies.diffusion.images import batches, parallel, parallel_for
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.store import interruption, partial
from tests.pipelines import save_tiny
from tests.unit.policies.diffusion.runs import TEXTS, chunk, pixels, policy

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_batches_at_once_give_the_images_of_one_after_the_other(
    tmp_path: Path,
) -> None:
    """Up to the rounding of batches, a level of 255; and the same bytes each time."""
    drawer = policy(save_tiny("sd", tmp_path / "sd"), tmp_path)
    together, again = drawer.generate(chunk(batch_size=4)), drawer.generate(chunk(batch_size=4))
    torch.set_num_threads(1)
    alone = drawer.generate(chunk(batch_size=4))
    assert [s.completion for s in together] == [s.completion for s in again]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_that_an_interrupted_chunk_had_generated_are_not_generated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)
    drawer = policy(save_tiny("sd", tmp_path / "sd"), tmp_path)
    steps: list[int] = []

    def check() -> None:
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt

    def generated() -> list[Any]:
        with partial.unfinished_work(tmp_path / "generate", tmp_path / "tmp", "00000", "key", {}):
            return drawer.generate(chunk(batch_size=4))

    monkeypatch.setattr(interruption, "raise_if_asked", check)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        stop = 0
        whole = generated()
        total = len(steps)
        assert total > 1
        stop = total + 1
        with pytest.raises(KeyboardInterrupt):
            generated()
        assert generated() == whole
        assert len(steps) == 2 * total
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_call_has_its_share_of_the_threads_and_torch_has_them_all_afterwards() -> None:
    both = threading.Barrier(2)  # passed by two calls at once, or not at all

    def seen(_: int) -> int:
        both.wait(timeout=60)
        return torch.get_num_threads()

    with parallel(2) as mapped:
        assert list(mapped(seen, range(2))) == [1, 1]
    assert torch.get_num_threads() == 2
    with parallel(1) as mapped:
        assert list(mapped(lambda _: torch.get_num_threads(), range(1))) == [2]


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_memory_that_runs_out_in_one_of_them_is_reported_with_the_whole_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = policy(save_tiny("sd", tmp_path / "sd"), tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(drawer.sampler.denoiser, "forward", full)
    with pytest.raises(OutOfMemory, match="got 4 rows"):
        drawer.generate(chunk(TEXTS, batch_size=4))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("count", "batch_size", "at_once", "sizes"),
    [
        (128, 256, 2, [64, 64]),
        (384, 256, 2, [96, 96, 96, 96]),
        (5, 2, 2, [1, 1, 1, 1, 1]),
        (7, 3, 1, [3, 2, 2]),
        (1, 8, 1, [1]),
    ],
)
def test_rows_are_spread_evenly_over_batches(count: int, batch_size: int, at_once: int, sizes: list[int]) -> None:
    found = batches(count, batch_size, at_once)
    assert [len(rows) for rows in found] == sizes
    assert [row for rows in found for row in rows] == list(range(count))


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_one_batch_at_a_time_where_batches_would_meet_in_the_weights_or_on_an_accelerator(tmp_path: Path) -> None:
    binding = policy(save_tiny("sd", tmp_path / "sd"), tmp_path).blank

    def call(**kwargs: Any) -> PipelineCall:
        return PipelineCall(16, 16, 2, 1.0, kwargs)

    assert parallel_for(binding, call(), CPU, 8) == 2
    assert parallel_for(binding, call(max_sequence_length=8), CPU, 8) == 2
    assert parallel_for(binding, call(), CPU, 1) == 1
    assert parallel_for(binding, call(cross_attention_kwargs={"scale": 0.5}), CPU, 8) == 1
    assert parallel_for(binding, call(), torch.device("cuda"), 8) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["dit", "ddpm"])
def test_what_watches_a_pipeline_s_own_loop_sees_its_own_batch(kind: Any, tmp_path: Path) -> None:
    """A DiT is told its labels beside its denoiser, and x0 is what its own scheduler left last."""
    drawer = policy(save_tiny(kind, tmp_path / kind), tmp_path, kind, guidance_scale=3.0 if kind == "dit" else None)
    together = drawer.generate(chunk((1, 2, 3), 4, batch_size=4))
    torch.set_num_threads(1)
    alone = drawer.generate(chunk((1, 2, 3), 4, batch_size=1))
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_a_vae_that_is_converted_while_it_decodes_serves_one_batch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "raftune.policies.diffusion.images.parallel", lambda count: seen.append(count) or parallel(count)
    )
    drawer = policy(save_tiny("sdxl", tmp_path / "sdxl"), tmp_path, "sdxl")
    drawer.generate(chunk(TEXTS, batch_size=4))
    monkeypatch.setattr(PipelineAdapter, "overflows", True)
    drawer.generate(chunk(TEXTS, batch_size=4))
    assert seen == [2, 1]
