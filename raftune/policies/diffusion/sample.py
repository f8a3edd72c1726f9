"""Generates images for conditions and seeds, in batches across prompts, with the pipeline's own loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raftune.policies.diffusion.images import PAYLOAD, payload_of
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall
from raftune.store import partial
from raftune.training.devices import names_out_of_memory
from raftune.training.quiet import quiet


def generate(
    bound: Callable[[], PipelineAdapter],
    conditions: Conditions,
    negative: Conditions | None,
    seeds: Sequence[int],
    call: PipelineCall,
    batch_size: int,
    device: torch.device,
    *,
    with_latents: bool,
) -> list[dict[str, Any]]:
    """The payload of each image: row i is for conditions' row i, its noise generated from seeds[i] alone.

    Each is what the pipeline gives for that prompt and a CPU generator of that seed, up to the rounding of batches.
    `bound` returns the pipeline with a scheduler of its own, as several batches run at once on a CPU; `batch_size`
    counts the rows of all of them. Raises OutOfMemory with it.
    """
    away = None if negative is None else negative.to(device)
    at_once = lanes_for(bound(), call, device, min(batch_size, len(seeds)))

    def generated(rows: list[int]) -> list[dict[str, Any]]:
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in rows]
        with names_out_of_memory(batch_size, "sampling.diffusion.height and width"), torch.inference_mode():
            images = bound().sample(conditions.take(rows).to(device), away, generators, call)
        return [payload_of(images, row, with_latents=with_latents) for row in range(len(rows))]

    payloads: list[dict[str, Any]] = []

    def save(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(payloads, schema=PAYLOAD), path, compression="none")

    def size() -> int:
        return sum(len(value) for payload in payloads for value in payload.values() if isinstance(value, bytes))

    every = batches(len(seeds), batch_size, at_once)
    with quiet(), partial.current("images").work() as part, lanes(at_once) as parallel_map:
        if (saved := part.find()) is not None:  # by an earlier attempt
            payloads.extend(pq.read_table(saved, use_threads=False).to_pylist())
        left = [rows for rows in every if rows[0] >= len(payloads)]
        for first in range(0, len(left), at_once):
            payloads.extend(
                payload for batch in parallel_map(generated, left[first : first + at_once]) for payload in batch
            )
            part.step(save, size, done=(len(payloads), len(seeds), "images"))
    return payloads


def lanes_for(adapter: PipelineAdapter, call: PipelineCall, device: torch.device, rows: int) -> int:
    """How many batches run at once: one on an accelerator, as many as torch has threads on a CPU.

    One, too, where the networks change while they are used: a scale of adapters in the call, which peft writes into the
    weights, or a VAE that is converted while it decodes.
    """
    scaled = any(name.endswith("attention_kwargs") for name in call.kwargs)
    if device.type != "cpu" or scaled or adapter.overflows:
        return 1
    return max(1, min(torch.get_num_threads(), rows))


def batches(count: int, batch_size: int, at_once: int) -> list[list[int]]:
    """The rows 0…count-1 in consecutive batches of similar size, of which `at_once` have at most batch_size rows."""
    parts = np.array_split(np.arange(count), math.ceil(count / batch_size) * at_once)
    return [part.tolist() for part in parts if len(part)]


@contextmanager
def lanes(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` that makes `count` calls at once, each with a share of torch's threads; results come in order, and the
    first failure ends all of them.

    Two batches of a small denoiser are faster in parallel on one core each than in sequence on two
    (docs/decisions/0025).
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        share = max(1, threads // count)
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # a later thread takes the number that was set last, by any thread
