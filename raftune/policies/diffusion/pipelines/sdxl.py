"""Adapter of Stable Diffusion XL: two CLIP text encoders, pooled embedding and size conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from raftune.policies.diffusion.pipelines.base import (
    Conditions,
    PipelineAdapter,
)
from raftune.policies.diffusion.pipelines.stable_diffusion import ENCODED_BEFORE

OTHER_SIZE = "the denoiser is trained on images of the size that is generated, uncropped, and told so"
SECOND_TEXT = "both text encoders read the prompt"


class SDXL(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D), `pooled` (N, P). The size conditions follow from the latents' own size."""

    pipelines = ("StableDiffusionXLPipeline",)
    denoiser_name = "unet"
    takes = "text"
    lora_layers = "unet_lora_layers"
    refused: ClassVar[Mapping[str, str]] = {
        "clip_skip": ENCODED_BEFORE,
        **dict.fromkeys(("prompt_2", "negative_prompt_2"), SECOND_TEXT),
        **dict.fromkeys(("original_size", "target_size", "crops_coords_top_left"), OTHER_SIZE),
        **dict.fromkeys(
            ("negative_original_size", "negative_target_size", "negative_crops_coords_top_left"), OTHER_SIZE
        ),
        "denoising_end": "latents would be left unfinished, and trained on as if they were clean",
    }

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        self.refuse_prompts(prompts)
        self.require("text_encoder_2", "tokenizer_2")  # the refiner has no first one
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return Conditions({"prompt_embeds": embeds, "pooled": pooled})

    def empty(self, negative: str | None = None) -> Conditions:
        found = self.encode([negative or ""])
        if negative is None and self.pipe.config.force_zeros_for_empty_prompt:
            return Conditions({name: torch.zeros_like(tensor) for name, tensor in found.tensors.items()})
        return found

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(
            x_t,
            t,
            encoder_hidden_states=conditions.tensors["prompt_embeds"],
            added_cond_kwargs={"text_embeds": conditions.tensors["pooled"], "time_ids": self._time_ids(x_t)},
            return_dict=False,
        )[0]
        return out

    def _time_ids(self, x_t: torch.Tensor) -> torch.Tensor:
        """(N, 6) original size, crop and target size in pixels, of an image that was neither scaled nor cropped."""
        height, width = (side * self.factor for side in x_t.shape[-2:])
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x_t.dtype, device=x_t.device)
        return ids.expand(len(x_t), -1)

    def to_latents(self, images: Sequence[Image.Image], generator: torch.Generator) -> torch.Tensor:
        vae, dtype = self.pipe.vae, self.pipe.vae.dtype
        overflows = self.overflows
        if overflows:  # its encoder does, as its decoder
            vae.to(torch.float32)
        found = self.encoded(images, generator)
        if overflows:
            vae.to(dtype)
        return self._scaled(found).to(dtype)

    def to_pixels(self, x0: torch.Tensor) -> torch.Tensor:
        if (centre := self._centre(x0)) is None:
            return super().to_pixels(x0)
        mean, std = centre
        return super().to_pixels(x0 * std + mean * self.pipe.vae.config.scaling_factor)

    def _scaled(self, found: torch.Tensor) -> torch.Tensor:
        """The VAE's latents as the denoiser sees them: centred where the VAE says how, then scaled."""
        scale: float = self.pipe.vae.config.scaling_factor
        if (centre := self._centre(found)) is None:
            return found * scale
        mean, std = centre
        return (found - mean) * scale / std

    def _centre(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and deviation of each latent channel (1, C, 1, 1), where the VAE says them."""
        config = self.pipe.vae.config
        if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
            return None
        mean, std = (
            torch.tensor(each).view(1, -1, 1, 1).to(like) for each in (config.latents_mean, config.latents_std)
        )
        return mean, std
