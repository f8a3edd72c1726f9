"""Reward `clip_score`: `logits_per_image` of image and prompt from a CLIPModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from raftune.config.rewards import derived_name
from raftune.data.classifier_inputs import text_of
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.builtin.clip import ClipModel, ClipReward
from raftune.rewards.builtin.model_options import ClipScoreOptions
from raftune.rewards.media import pictures


class ClipScoreReward(ClipReward):
    """logit_scale · cos(image, text): of each image and its own prompt. PickScore is the same of another model.

    Configuration, image processor and tokenizer are read at once, the weights by `prepare` or the first call. Raises
    RewardError where they cannot be read. Hessel et al. 2021, arXiv 2104.08718; Kirstain et al. 2023, arXiv 2305.01569.
    """

    def __init__(
        self, options: ClipScoreOptions, *, name: str | None = None, device: str = "auto", clip: ClipModel | None = None
    ) -> None:
        self.options = options
        self.name = name or derived_name(options.model)
        self.clip = clip or ClipModel(
            options.model,
            device,
            options.dtype,
            processor=options.processor,
            revision=options.revision,
            batch_size=options.batch_size,
        )
        _ = self.clip.limit  # a tokenizer that is not there is missed now
        self._seen: set[str] = set()
        self._notes: list[str] = []

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        texts = self._texts(prompts, columns)
        different = list(dict.fromkeys(texts))  # K images answer one prompt: it is read once
        number = {text: i for i, text in enumerate(different)}
        pictures_ND = self.clip.image_features(pictures(completions, self.name)).astype(np.float64)
        texts_ND = self.clip.text_features(different).astype(np.float64)[[number[text] for text in texts]]
        self._count_cut(different)
        scale = 1.0 if self.options.cosine else self.clip.logit_scale
        return [float(value) for value in scale * np.einsum("nd,nd->n", pictures_ND, texts_ND)]

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights, the image processor, the tokenizer and the options."""
        return fingerprint.digest(
            "clip_score", 1, self.clip.text_fingerprint, self.options.cosine, self.options.column or ""
        )

    def notes(self) -> tuple[str, ...]:
        """What of the prompts was not read; each prompt is told of once, and what was told is not told again."""
        told, self._notes = self._notes, []
        return tuple(told)

    def _texts(self, prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[str]:
        column = self.options.column
        if column is not None and column not in columns:
            raise RewardError(
                f"reward {self.name!r}: options.column names {column!r}, which the prompts lack. Name a column of the "
                "data set, or leave it out: the prompt itself is the text."
            )
        found = prompts if column is None else columns[column]
        for one in found:
            if not isinstance(one, str | list):
                raise RewardError(
                    f"reward {self.name!r} compares an image with a text; got {type(one).__name__} {one!r}. Name a "
                    "column that holds one: options.column: caption."
                )
        return [text_of(one) for one in found]

    def _count_cut(self, texts: list[str]) -> None:
        new = [text for text in texts if text not in self._seen]
        self._seen.update(new)
        if lengths := self.clip.too_long(new):
            self._notes.append(
                f"{self.name}: {len(lengths)} of {len(new)} prompts are longer than the {self.clip.limit} tokens that "
                f"the text encoder reads (the longest has {max(lengths)}): what comes after is not scored"
            )
