"""Adapter of DDPM and DDIM: an unconditional UNet on pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from raftune.errors import ConfigError
from raftune.policies.diffusion.pipelines.base import (
    Conditions,
    PipelineAdapter,
    PipelineCall,
    SampledImages,
    pixels_of,
)
from raftune.policies.diffusion.scheduler_trace import SchedulerStep, watched


class DDPM(PipelineAdapter):
    """Conditions: `rows` (N,), which say nothing. A clean latent is the image, in [-1, 1] but for what is clipped."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    denoiser_name = "unet"
    takes = "nothing"
    lora_layers = ""

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        return Conditions({"rows": torch.zeros(len(prompts))})

    def empty(self, negative: str | None = None) -> Conditions:
        if negative is not None:
            raise ConfigError(
                f"sampling.diffusion.negative_prompt must not be given to an unconditional pipeline; got {negative!r}. "
                "It reads no text: leave it out."
            )
        return self.encode([None])

    def sample(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> SampledImages:
        last: deque[SchedulerStep] = deque(maxlen=1)
        with watched(self.pipe.scheduler, last.append):
            drawn = self.pipe(
                batch_size=len(conditions),
                num_inference_steps=call.num_inference_steps,
                generator=generators,
                output_type="pt",  # as "np" it cannot be had in bfloat16
                **call.kwargs,
            )
        found = drawn.images.cpu().permute(0, 2, 3, 1)
        pixels = (found.float() if found.dtype == torch.bfloat16 else found).numpy()
        return SampledImages.of(pixels, last[0].latents)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(x_t, t, return_dict=False)[0]
        return out[:, : x_t.shape[1]]  # a learned variance would follow

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        found = pixels_of(images, next(self.denoiser.parameters()))
        grey = int(self.denoiser.config.in_channels) == 1
        return found.mean(1, keepdim=True) if grey else found

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)

    def refuse_size(self, height: int, width: int) -> None:
        self.refuse_other_size(height, width)
