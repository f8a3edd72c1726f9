"""What the tests of generating share: starts of tiny pipelines, and units of a few prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from raftune.config.sampling import DiffusionSampling
from raftune.policies.diffusion import Diffusion
from raftune.protocols import Chunk
from raftune.records import Prompt, Sample
from tests.unit.policies.diffusion.fits import Parts, parts, start_of

TEXTS = ("a red circle", "a blue square", "the green circle on black")


def calling(config: Parts, **options: Any) -> Parts:
    """The configuration with these fields of sampling.diffusion in place of all that it had."""
    return replace(config, sampling=config.sampling.model_copy(update={"diffusion": DiffusionSampling(**options)}))


def policy(model: Path, root: Path, kind: str = "sd", **options: Any) -> Diffusion:
    """The start's policy of a run under `root`, called with these options (two steps, unguided, unless told)."""
    config = calling(parts(model, kind), **{"num_inference_steps": 2, "guidance_scale": 1.0, **options})
    start = start_of(config, root)
    return Diffusion.load(config, start, start)


def chunk(
    texts: tuple[Any, ...] = TEXTS, k: int = 2, *, batch_size: int = 64, scope: str = "0001", first_seed: int = 0
) -> Chunk:
    """Each prompt k times, with seeds counted up."""
    prompts = tuple(Prompt(f"p{i}", text) for i, text in enumerate(texts))
    seeds = tuple(tuple(first_seed + i * k + j for j in range(k)) for i in range(len(texts)))
    return Chunk(0, scope, "round-0000", prompts, seeds, batch_size)


def pixels(sample: Sample) -> Any:
    """(H, W, 3) whole numbers."""
    import numpy as np

    from raftune.data.images import image_of

    return np.asarray(image_of(sample.completion), dtype=int)
