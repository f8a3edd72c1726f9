"""Adapter of Stable Diffusion 3 and 3.5: a flow-matching transformer with two CLIPs and an optional T5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from raftune.policies.diffusion.pipelines.base import ENCODED_BEFORE, ONE_TEXT, PipelineAdapter


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
    text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    text_options: ClassVar[Mapping[str, Any]] = {
        "prompt_2": None,
        "prompt_3": None,
        "do_classifier_free_guidance": False,
    }
    text_outputs = ("prompt_embeds", None, "pooled")

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"encoder_hidden_states": conditions["prompt_embeds"], "pooled_projections": conditions["pooled"]}
