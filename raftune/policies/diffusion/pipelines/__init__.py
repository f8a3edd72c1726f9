"""Pipeline adapters, one class for each architecture, and their lookup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raftune.errors import ModelError
from raftune.policies.diffusion.pipelines.base import PipelineAdapter
from raftune.policies.diffusion.pipelines.ddpm import DDPM
from raftune.policies.diffusion.pipelines.dit import DiT
from raftune.policies.diffusion.pipelines.flux import Flux
from raftune.policies.diffusion.pipelines.pixart import PixArt
from raftune.policies.diffusion.pipelines.sd3 import SD3
from raftune.policies.diffusion.pipelines.sdxl import SDXL
from raftune.policies.diffusion.pipelines.stable_diffusion import StableDiffusion

ADAPTERS: tuple[type[PipelineAdapter], ...] = (StableDiffusion, SDXL, SD3, Flux, PixArt, DiT, DDPM)


def adapter_class(pipeline: str) -> type[PipelineAdapter]:
    """The adapter of the pipelines of this class. Raises ModelError, with those that are supported."""
    for kind in ADAPTERS:
        if pipeline in kind.pipelines:
            return kind
    supported = ", ".join(sorted(name for kind in ADAPTERS for name in kind.pipelines))
    raise ModelError(
        f"policy.model must be a pipeline that raftune knows how to tune; got a {pipeline}. Supported are {supported}: "
        "use one of these, or write a family of your own (docs/families.md)."
    )


def adapter_of(pipe: Any, options: Mapping[str, Any] | None = None) -> PipelineAdapter:
    """The adapter of this pipeline, called with these options. Raises ModelError for an unsupported class."""
    return adapter_class(type(pipe).__name__)(pipe, options)
