"""Adapter of Stable Diffusion 1.x and 2.x: a UNet on VAE latents, with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import ENCODED_BEFORE, PipelineAdapter


class StableDiffusion(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D)."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser_name = "unet"
    takes = "text"
    lora_layers = "unet_lora_layers"
    refused: ClassVar[Mapping[str, str]] = {"clip_skip": ENCODED_BEFORE}
    text_options: ClassVar[Mapping[str, Any]] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    text_outputs = ("prompt_embeds",)

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": conditions["prompt_embeds"]}
