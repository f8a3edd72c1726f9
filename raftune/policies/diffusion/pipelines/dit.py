"""Adapter of DiT: a class-conditional transformer on latents."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raftune.errors import ConfigError, DataError
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall


class LabelledDenoiser:
    """A denoiser with these labels as input: the pipeline takes 1000 for no class, however many classes there are.

    It wraps the denoiser rather than hooking into it: several batches are generated with one denoiser at once.
    """

    def __init__(self, denoiser: Any, labels: torch.Tensor) -> None:
        self._denoiser, self._labels = denoiser, labels

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._denoiser(*args, **{**kwargs, "class_labels": self._labels})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


class DiT(PipelineAdapter):
    """Conditions: `labels` (N,). No class at all is the number after the last."""

    pipelines = ("DiTPipeline",)
    denoiser_name = "transformer"
    takes = "label"
    lora_layers = ""
    fixed_size = True

    @property
    def classes(self) -> int:
        return int(self.denoiser.config.num_embeds_ada_norm)

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        names: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        for prompt in prompts:
            if isinstance(prompt, int) and not isinstance(prompt, bool) and 0 <= prompt < self.classes:
                continue
            fix = "A model of classes reads no text, and knows no other class."
            if isinstance(prompt, str) and prompt in names:
                fix = f"Write its number, {names[prompt]}, as a number."
            elif isinstance(prompt, str) and prompt.strip().isdigit():
                fix = f"Write {prompt.strip()} as a number, without quotes."
            raise DataError(
                f"prompts of a DiTPipeline must be class labels, whole numbers from 0 to {self.classes - 1}; got "
                f"{prompt!r}. {fix}"
            )

    def encode(self, prompts: Sequence[Any]) -> Conditions:
        self.check_prompts(prompts)
        return Conditions({"labels": torch.tensor(list(prompts), dtype=torch.long)})

    def empty(self, negative: str | None = None) -> Conditions:
        if negative is not None:
            raise ConfigError(
                f"sampling.diffusion.negative_prompt must not be given to a DiTPipeline; got {negative!r}. A model of "
                "classes reads no text: leave it out."
            )
        return Conditions({"labels": torch.tensor([self.classes])})

    def run(
        self, conditions: Conditions, negative: Conditions | None, generators: list[torch.Generator], call: PipelineCall
    ) -> Any:
        labels = conditions.tensors["labels"]
        away = (negative or self.empty()).tensors["labels"].to(labels.device).expand_as(labels)
        pipe = copy.copy(self.pipe)
        both = torch.cat([labels, away]) if call.guidance_scale > 1 else labels
        vars(pipe)["transformer"] = LabelledDenoiser(self.denoiser, both)
        return pipe(
            class_labels=labels.tolist(),
            num_inference_steps=call.num_inference_steps,
            guidance_scale=call.guidance_scale,
            generator=generators,
            output_type="np",
            **call.kwargs,
        )

    def inputs(self, x_t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"class_labels": conditions["labels"]}
