"""Adapter of Stable Diffusion 3 and 3.5: a flow-matching transformer with two CLIPs and an optional T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import (
    Conditions,
    PipelineAdapter,
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

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        out: torch.Tensor = self.denoiser(
            hidden_states=x_t,
            timestep=t,
            encoder_hidden_states=conditions.tensors["prompt_embeds"],
            pooled_projections=conditions.tensors["pooled"],
            return_dict=False,
        )[0]
        return out
