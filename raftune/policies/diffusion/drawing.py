"""Pictures for conditions and seeds: batches across prompts, through the pipeline's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from raftune.pictures import png_of, sha256_of_png, why_invalid
from raftune.policies.diffusion.binding import Binding, Call, Conditions, Pictures
from raftune.policies.diffusion.latents import NONE, columns_of
from raftune.policies.memory import names_out_of_memory
from raftune.quiet import quiet

NOT_FINITE = "not finite"
FLAGGED = "flagged by the safety checker"
NO_PICTURE = {"completion": None, "image_sha256": None, **NONE}


def draw(
    binding: Binding,
    conditions: Conditions,
    negative: Conditions | None,
    seeds: Sequence[int],
    call: Call,
    batch_size: int,
    device: torch.device,
) -> Iterator[Pictures]:
    """The pictures of consecutive batches: row i answers conditions' row i, its noise drawn from seeds[i] alone.

    Each is what the pipeline gives for that prompt and a CPU generator of that seed, up to the rounding of batches.
    Raises OutOfMemory with the batch size.
    """
    for first in range(0, len(seeds), batch_size):
        chosen = list(range(first, min(first + batch_size, len(seeds))))
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in chosen]
        with names_out_of_memory(batch_size, "sampling.diffusion.height and width"), torch.inference_mode(), quiet():
            asked = conditions.take(chosen).to(device)
            away = None if negative is None else negative.to(device)
            yield binding.sample(asked, away, generators, call)


def payload_of(pictures: Pictures, row: int, *, with_latents: bool) -> dict[str, Any]:
    """The columns of one picture; where it is nothing to learn from, `invalid` says why, and no latents are kept."""
    if not pictures.finite[row]:
        return {**NO_PICTURE, "invalid": NOT_FINITE}
    if pictures.flagged[row]:
        return {**NO_PICTURE, "invalid": FLAGGED}
    image = pictures.images[row]
    why, png = why_invalid(image), png_of(image)
    latents = columns_of(pictures.x0[row]) if with_latents and why is None else NONE
    return {"completion": png, "image_sha256": sha256_of_png(png), "invalid": why, **latents}
