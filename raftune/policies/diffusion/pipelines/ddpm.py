"""Adapter of DDPM and DDIM: an unconditional UNet on pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from raftune.errors import ConfigError
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, pixels_of


class DDPM(PipelineAdapter):
    """Conditions: `rows` (N,), without meaning. A clean latent is the image, in [-1, 1] before clipping."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    denoiser_name = "unet"
    takes = "nothing"
    lora_layers = ""
    fixed_size = True

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        return Conditions({"rows": torch.zeros(len(prompts))})

    def empty(self, negative: str | None = None) -> Conditions:
        if negative is not None:
            raise ConfigError(
                f"sampling.diffusion.negative_prompt must not be given to an unconditional pipeline; got {negative!r}. "
                "It reads no text: leave it out."
            )
        return self.encode([None])

    def run(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> Any:
        return self.pipe(
            batch_size=len(conditions),
            num_inference_steps=call.num_inference_steps,
            generator=generators,
            output_type="pt",  # "np" fails in bfloat16
            **call.kwargs,
        )

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        pixels = pixels_of(images, next(self.denoiser.parameters()))
        return pixels.mean(1, keepdim=True) if int(self.denoiser.config.in_channels) == 1 else pixels

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)
