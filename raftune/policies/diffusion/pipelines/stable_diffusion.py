"""Adapter of Stable Diffusion 1.x and 2.x: a UNet on VAE latents, with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import (
    Conditions,
    PipelineAdapter,
)

ENCODED_BEFORE = "prompts are encoded once, before the pipeline is called, without it"


class StableDiffusion(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D)."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    takes = "text"
    lora_layers = "unet_lora_layers"
    refused: ClassVar[Mapping[str, str]] = {"clip_skip": ENCODED_BEFORE}

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        self.refuse_prompts(prompts)
        self.require("text_encoder", "tokenizer")
        embeds, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            device=self.pipe.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return Conditions({"prompt_embeds": embeds})

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        embeds = conditions.tensors["prompt_embeds"]
        out: torch.Tensor = self.denoiser(x_t, t, encoder_hidden_states=embeds, return_dict=False)[0]
        return out
