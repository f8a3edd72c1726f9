"""Adapter of Stable Diffusion XL: two CLIP text encoders, pooled embedding and size conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from raftune.policies.diffusion.pipelines.base import ENCODED_BEFORE, Conditions, PipelineAdapter

OTHER_SIZE = "the denoiser is trained on uncropped images of the generated size, which is one of its inputs"
SECOND_TEXT = "both text encoders read the prompt"
SIZES = ("original_size", "target_size", "crops_coords_top_left")


class SDXL(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D), `pooled` (N, P). The size conditions follow from the latents' own size."""

    pipelines = ("StableDiffusionXLPipeline",)
    denoiser_name = "unet"
    takes = "text"
    lora_layers = "unet_lora_layers"
    refused: ClassVar[Mapping[str, str]] = {
        "clip_skip": ENCODED_BEFORE,
        **dict.fromkeys(("prompt_2", "negative_prompt_2"), SECOND_TEXT),
        **dict.fromkeys((*SIZES, *(f"negative_{name}" for name in SIZES)), OTHER_SIZE),
        "denoising_end": "latents would be left unfinished, and trained on as if they were clean",
    }
    text_parts = ("text_encoder_2", "tokenizer_2")  # the refiner has no first one
    text_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}
    text_outputs = ("prompt_embeds", None, "pooled")

    def empty(self, negative: str | None = None) -> Conditions:
        conditions = self.encode([negative or ""])
        if negative is None and self.pipe.config.force_zeros_for_empty_prompt:
            return Conditions({name: torch.zeros_like(tensor) for name, tensor in conditions.tensors.items()})
        return conditions

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        sizes = {"text_embeds": conditions["pooled"], "time_ids": self._time_ids(x_t)}
        return {"encoder_hidden_states": conditions["prompt_embeds"], "added_cond_kwargs": sizes}

    def _time_ids(self, x_t: torch.Tensor) -> torch.Tensor:
        """(N, 6) original size, crop and target size in pixels, of an image that was neither scaled nor cropped."""
        height, width = (side * self.factor for side in x_t.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x_t.dtype, device=x_t.device)
        return ids.expand(len(x_t), -1)

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        vae, dtype, overflows = self.pipe.vae, self.pipe.vae.dtype, self.overflows
        if overflows:  # its encoder does, as its decoder
            vae.to(torch.float32)
        latents = self.encoded(images, generator)
        if overflows:
            vae.to(dtype)
        scale: float = vae.config.scaling_factor
        if (centre := self._centre(latents)) is None:
            return (latents * scale).to(dtype)
        mean, std = centre
        return ((latents - mean) * scale / std).to(dtype)

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        if (centre := self._centre(x0)) is None:
            return super().to_pixels(x0)
        mean, std = centre
        return super().to_pixels(x0 * std + mean * self.pipe.vae.config.scaling_factor)

    def _centre(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and deviation of each latent channel (1, C, 1, 1), where the VAE has them."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return None
        return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)
