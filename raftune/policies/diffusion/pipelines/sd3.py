"""Adapter of Stable Diffusion 3 and 3.5: a flow-matching transformer with two CLIPs and an optional T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import (
    Conditions,
    LastLatents,
    PipelineAdapter,
    PipelineCall,
    SampledImages,
)
from raftune.policies.diffusion.pipelines.stable_diffusion import ENCODED_BEFORE

ONE_TEXT = "every text encoder reads the prompt"


class SD3(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D) of all encoders, `pooled` (N, P) of the two CLIPs."""

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_name = "transformer"
    takes = "text"
    lora_layers = "transformer_lora_layers"
    reads = ("max_sequence_length",)
    shifts = True
    refused: ClassVar[Mapping[str, str]] = {
        "clip_skip": ENCODED_BEFORE,
        **dict.fromkeys(("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3"), ONE_TEXT),
    }

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        self.refuse_prompts(prompts)
        self.require("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            **self.reading(),
        )
        return Conditions({"prompt_embeds": embeds, "pooled": pooled})

    def sample(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> SampledImages:
        last = LastLatents()
        asked = conditions.tensors
        away = conditions.away(negative)
        drawn = self.pipe(
            prompt_embeds=asked["prompt_embeds"],
            pooled_prompt_embeds=asked["pooled"],
            negative_prompt_embeds=away.get("prompt_embeds"),
            negative_pooled_prompt_embeds=away.get("pooled"),
            callback_on_step_end=last,
            **call.options(generators),
        )
        assert last.x0 is not None
        return SampledImages.of(drawn.images, last.x0)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=conditions.tensors["prompt_embeds"],
            pooled_projections=conditions.tensors["pooled"],
            return_dict=False,
        )[0]
        return out
