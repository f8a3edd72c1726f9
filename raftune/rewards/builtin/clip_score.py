"""Rewards `clip_score` and `pick_score`: `logits_per_image` of image and prompt from a CLIPModel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field

from raftune.config.rewards import derived_name
from raftune.data.classifier_inputs import text_of
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.batch import images
from raftune.rewards.builtin.models import ClipReward, Dtype, ImageBatch, Revision
from raftune.rewards.registry import builtin

PICK_SCORE = "yuvalkirstain/PickScore_v1"
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # what it was trained with: its own folder has none


@builtin("clip_score", media=("image",), example={"model": "openai/clip-vit-large-patch14"}, model_type="clip")
@dataclass
class ClipScoreReward(ClipReward):
    """Similarity of image and prompt by a CLIPModel: their cosine times the model's logit scale.

    This is `logits_per_image`: in the published models from about 10 (unrelated) to 35 (Hessel et
    al. 2021, arXiv 2104.08718).
    """

    model: Annotated[str, Field(description="Folder or hub name of a CLIPModel.")] = "openai/clip-vit-large-patch14"
    processor: Annotated[
        str | None,
        Field(description="Folder or hub name of the image processor and tokenizer, if the model has none."),
    ] = None
    cosine: Annotated[bool, Field(description="The cosine in [-1, 1], without the logit scale.")] = False
    column: Annotated[str | None, Field(description="Column with the text to compare with; null: the prompt.")] = None
    batch_size: ImageBatch = 32
    dtype: Dtype = "float32"
    revision: Revision = None

    def load(self, name: str | None = None, device: str = "auto", model: Any = None, processor: Any = None) -> Self:
        """Reads configuration, image processor and tokenizer, or takes a CLIPModel and its processor as objects."""
        from raftune.rewards.builtin.clip import ClipModel

        self.name = name or derived_name(self.model)
        self.clip_model = ClipModel(
            self.model if model is None else model,
            device,
            self.dtype,
            processor=processor or self.processor,
            revision=self.revision,
            batch_size=self.batch_size,
        )
        _ = self.clip_model.limit  # a missing tokenizer is an error now
        self.needs = frozenset() if self.column is None else frozenset({self.column})
        self._seen: set[str] = set()
        self._notes: list[str] = []
        return self

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if self.column is not None and self.column not in columns:
            raise RewardError(
                f"reward {self.name!r}: options.column names {self.column!r}, which the prompts lack. Name a column of "
                "the data set, or leave it out: the prompt itself is the text."
            )
        texts = []
        for value in prompts if self.column is None else columns[self.column]:
            if not isinstance(value, str | list):
                raise RewardError(
                    f"reward {self.name!r} compares an image with a text; got {type(value).__name__} {value!r}. Name a "
                    "column that holds one: options.column: caption."
                )
            texts.append(text_of(value))
        different = list(dict.fromkeys(texts))  # the K images of one prompt: it is read once
        number = {text: i for i, text in enumerate(different)}
        images_ND = self.clip_model.image_features(images(completions, self.name)).astype(np.float64)
        texts_ND = self.clip_model.text_features(different).astype(np.float64)[[number[text] for text in texts]]
        new = [text for text in different if text not in self._seen]
        self._seen.update(new)
        if lengths := self.clip_model.too_long(new):
            self._notes.append(
                f"{self.name}: {len(lengths)} of {len(new)} prompts are longer than the {self.clip_model.limit} tokens "
                f"that the text encoder reads (the longest has {max(lengths)}): what comes after is not scored"
            )
        scale = 1.0 if self.cosine else self.clip_model.logit_scale
        return [float(value) for value in scale * np.einsum("nd,nd->n", images_ND, texts_ND)]

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights, the image processor, the tokenizer and the options."""
        return fingerprint.digest("clip_score", 1, self.clip_model.text_fingerprint, self.cosine, self.column or "")

    def notes(self) -> tuple[str, ...]:
        """How many prompts were cut since the last call; each prompt is counted once."""
        notes, self._notes = self._notes, []
        return tuple(notes)


@builtin("pick_score", media=("image",), example={})
@dataclass
class PickScoreReward(ClipScoreReward):
    """As clip_score, with a model trained on human choices between images (arXiv 2305.01569).

    The published model has no processor; that of its training is used.
    """

    model: Annotated[str, Field(description="Folder or hub name of a CLIPModel.")] = PICK_SCORE

    def __post_init__(self) -> None:
        if self.model == PICK_SCORE and self.processor is None:
            self.processor = PICK_PROCESSOR
