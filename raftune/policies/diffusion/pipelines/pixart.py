"""Adapter of PixArt Alpha and Sigma: a transformer on latents, with T5 and optional size conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.utils import is_bs4_available, is_ftfy_available

from raftune.errors import ConfigError
from raftune.policies.diffusion.pipelines.base import PipelineAdapter

EXACT_SIZE = (
    "images are generated at the very size that is asked, so that their latents are theirs: ask for one of its own"
)


class PixArt(PipelineAdapter):
    """Conditions: `prompt_embeds` (N, T, D), `mask` (N, T). Size conditions follow from the latents' own size."""

    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    denoiser_name = "transformer"
    takes = "text"
    lora_layers = ""
    reads = ("max_sequence_length", "clean_caption")
    refused: ClassVar[Mapping[str, str]] = {"use_resolution_binning": EXACT_SIZE}
    text_options: ClassVar[Mapping[str, Any]] = {"do_classifier_free_guidance": False}
    text_outputs = ("prompt_embeds", "mask")
    call_inputs: ClassVar[Mapping[str, str]] = {"prompt_embeds": "prompt_embeds", "prompt_attention_mask": "mask"}
    call_options: ClassVar[Mapping[str, Any]] = {
        "negative_prompt": None,  # its default would forbid embeddings
        "use_resolution_binning": False,
    }

    def reading(self) -> dict[str, Any]:
        """Captions are cleaned where the packages for it are installed, as the pipeline does, without its warnings."""
        options = super().reading()
        able = is_bs4_available() and is_ftfy_available()
        if self.options.get("clean_caption") and not able:
            raise ConfigError(
                "sampling.diffusion.pipeline_kwargs.clean_caption needs beautifulsoup4 and ftfy, which are not "
                "installed: pip install beautifulsoup4 ftfy, or write false."
            )
        return {**options, "clean_caption": bool(options["clean_caption"]) and able}

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {
            "encoder_hidden_states": conditions["prompt_embeds"],
            "encoder_attention_mask": conditions["mask"],
            "added_cond_kwargs": self._size_of(x_t),
        }

    def _size_of(self, x_t: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Height and width (N, 2), and their ratio (N, 1), where the denoiser takes them."""
        if not self.denoiser.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.factor for side in x_t.shape[-2:])
        sizes = torch.tensor([[height, width]], device=x_t.device).to(x_t.dtype)
        ratio = torch.tensor([[height / width]], device=x_t.device).to(x_t.dtype)
        return {"resolution": sizes.repeat(len(x_t), 1), "aspect_ratio": ratio.repeat(len(x_t), 1)}
