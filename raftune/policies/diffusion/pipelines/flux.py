"""Adapter of Flux.1: a flow-matching transformer on packed latents, with T5 and pooled CLIP conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import ONE_TEXT, Conditions, PipelineAdapter, PipelineCall

PACK = 2  # cells of a side that are packed into one token


class Flux(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D), `pooled` (N, P); of a guidance-distilled model also `guidance` (N,).

    Latents are kept unpacked. Negative prompts count only where pipeline_kwargs hold a true_cfg_scale above 1: the
    guidance scale itself is one more input of the denoiser.
    """

    pipelines = ("FluxPipeline",)
    denoiser_name = "transformer"
    takes = "text"
    lora_layers = "transformer_lora_layers"
    reads = ("max_sequence_length",)
    shifts = True
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(("prompt_2", "negative_prompt_2"), ONE_TEXT)
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_options: ClassVar[Mapping[str, Any]] = {"prompt_2": None}
    text_outputs = ("prompt_embeds", "pooled")

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        return self.guided(super().encode(prompts), 1.0)

    def guided(self, conditions: Conditions, scale: float) -> Conditions:
        if not self.denoiser.config.guidance_embeds:
            return conditions
        device = conditions.tensors["pooled"].device
        return Conditions({**conditions.tensors, "guidance": torch.full((len(conditions),), scale, device=device)})

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        inputs = conditions.tensors
        count, channels, height, width = x_t.shape
        out: torch.Tensor = self.denoiser(
            hidden_states=self.pipe._pack_latents(x_t, count, channels, height, width),
            timestep=t.to(x_t.dtype) / 1000,
            guidance=inputs.get("guidance"),
            pooled_projections=inputs["pooled"],
            encoder_hidden_states=inputs["prompt_embeds"],
            txt_ids=torch.zeros(inputs["prompt_embeds"].shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(count, height // PACK, width // PACK, x_t.device, x_t.dtype),
            return_dict=False,
        )[0]
        return self._unpack(out, height * self.factor, width * self.factor)

    def unpacked(self, latents: torch.Tensor, call: PipelineCall) -> torch.Tensor:
        return self._unpack(latents, call.height, call.width)

    def _unpack(self, packs: torch.Tensor, height: int, width: int) -> torch.Tensor:
        latents: torch.Tensor = self.pipe._unpack_latents(packs, height, width, self.factor)
        return latents

    @property
    def multiple(self) -> int:
        return self.factor * PACK

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return int(self.denoiser.config.in_channels) // PACK**2, height // self.factor, width // self.factor
