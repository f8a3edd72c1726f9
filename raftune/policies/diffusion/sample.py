"""Generates images for conditions and seeds, in batches across prompts, with the pipeline's own loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raftune.data.images import png_of, sha256_of_png, why_invalid
from raftune.policies.diffusion.latents import FIELDS, NONE, columns_of
from raftune.policies.diffusion.parallel import lanes
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, SampledImages
from raftune.store import partial
from raftune.training.memory import names_out_of_memory
from raftune.training.quiet import quiet

NOT_FINITE = "not finite"
FLAGGED = "flagged by the safety checker"
NO_PICTURE = {"completion": None, "image_sha256": None, **NONE}


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
    """The payload of each image: row i answers conditions' row i, its noise generated from seeds[i] alone.

    Each is what the pipeline gives for that prompt and a CPU generator of that seed, up to the rounding of batches.
    `bound` gives the pipeline with a scheduler of its own, for on a CPU several batches are generated at once;
    `batch_size` counts the rows of all of them. Raises OutOfMemory with it.
    """
    away = None if negative is None else negative.to(device)
    at_once = lanes_for(bound(), call, device, min(batch_size, len(seeds)))

    def drawn(rows: list[int]) -> list[dict[str, Any]]:
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in rows]
        with names_out_of_memory(batch_size, "sampling.diffusion.height and width"), torch.inference_mode():
            pictures = bound().sample(conditions.take(rows).to(device), away, generators, call)
        return [payload_of(pictures, row, with_latents=with_latents) for row in range(len(rows))]

    payloads: list[dict[str, Any]] = []

    def save(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(payloads, schema=COLUMNS), path, compression="none")

    def size() -> int:
        return sum(len(value) for payload in payloads for value in payload.values() if isinstance(value, bytes))

    every = batches(len(seeds), batch_size, at_once)
    with quiet(), partial.current("images").work() as part, lanes(at_once) as mapped:
        if (found := part.find()) is not None:  # what an earlier attempt had generated
            payloads.extend(pq.read_table(found, use_threads=False).to_pylist())
        ready = len(payloads)
        left = [rows for rows in every if rows[0] >= ready]
        for at in range(0, len(left), at_once):  # side by side, and all of them done before the next are begun
            payloads.extend(one for batch in mapped(drawn, left[at : at + at_once]) for one in batch)
            part.step(save, size, done=(len(payloads), len(seeds), "images"))
    return payloads


def lanes_for(binding: PipelineAdapter, call: PipelineCall, device: torch.device, rows: int) -> int:
    """How many batches are generated at once: one on an accelerator, as many as torch has threads on a CPU.

    One, too, where the networks change while they are used: a scale of adapters in the call, which peft writes into the
    weights, or a VAE that is converted while it decodes.
    """
    scaled = any(name.endswith("attention_kwargs") for name in call.kwargs)
    if device.type != "cpu" or scaled or binding.overflows:
        return 1
    return max(1, min(torch.get_num_threads(), rows))


def batches(count: int, batch_size: int, at_once: int) -> list[list[int]]:
    """The rows 0…count-1 in consecutive batches of like size, of which `at_once` have at most batch_size rows."""
    parts = np.array_split(np.arange(count), math.ceil(count / batch_size) * at_once)
    return [part.tolist() for part in parts if len(part)]


COLUMNS = pa.schema(
    [
        pa.field("completion", pa.binary()),
        pa.field("image_sha256", pa.string()),
        pa.field("invalid", pa.string()),
        *FIELDS,
    ]
)


def payload_of(pictures: SampledImages, row: int, *, with_latents: bool) -> dict[str, Any]:
    """The columns of one image; where it is nothing to learn from, `invalid` says why, and no latents are kept."""
    if not pictures.finite[row]:
        return {**NO_PICTURE, "invalid": NOT_FINITE}
    if pictures.flagged[row]:
        return {**NO_PICTURE, "invalid": FLAGGED}
    image = pictures.images[row]
    why, png = why_invalid(image), png_of(image)
    latents = columns_of(pictures.x0[row]) if with_latents and why is None else NONE
    return {"completion": png, "image_sha256": sha256_of_png(png), "invalid": why, **latents}
