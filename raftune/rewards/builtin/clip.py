"""CLIP embeddings of images and texts, for rewards and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from raftune.arrays import Float32Array
from raftune.data.classifier_inputs import is_hollow, longest
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.builtin.models import HeldWeights, weights_fingerprint
from raftune.rewards.outcome import one_line
from raftune.training.devices import choose_device


class ClipModel(HeldWeights):
    """Images and texts as vectors of length 1: the dot product of two is the cosine between them.

    `model` is a folder or hub name, or a CLIPModel itself, which needs `processor` as an object. Otherwise `processor`
    names the folder of image processor and tokenizer if the model's own lacks them. Tokenizer and weights are read when
    they are first used. Raises RewardError that names `field`, or ConfigError. Radford et al. 2021, arXiv 2103.00020.
    """

    def __init__(
        self,
        model: Any,
        device: str = "auto",
        dtype: str = "float32",
        *,
        processor: Any = None,
        revision: str | None = None,
        batch_size: int = 32,
        field: str = "reward_funcs",
    ) -> None:
        self.device = str(choose_device(device, "rewards.device"))
        self.dtype, self.batch_size, self.field = dtype, batch_size, field
        self.revision = revision
        self._given = None if isinstance(model, str | Path) else model
        self.source = str(model) if self._given is None else str(getattr(model.config, "_name_or_path", "") or "model")
        self._processor = processor
        if self._given is not None:
            self.config = model.config
            self._image_processor = self._part_of_processor("image_processor")
            return
        self.config = self._read("configuration", AutoConfig, self.source, revision=revision)
        if self.config.model_type != "clip":
            heads = list(getattr(self.config, "architectures", None) or [self.config.model_type])
            raise RewardError(
                f"{field}: {self.source!r} is a {heads[0]}, and CLIP scores need a CLIPModel. Name another model."
            )
        # Pillow's arithmetic, also where torchvision is installed: the same numbers on every machine.
        reader = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        self._image_processor = self._read_part("image processor", reader)

    # -- vectors ----------------------------------------------------------------------------------------------------

    def image_features(self, images: Sequence[Any]) -> Float32Array:
        """(N, d) vectors of length 1 of PIL images of any sizes; each is resized and cropped as the model wants it."""
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(images), self.batch_size):
            chunk = [image.convert("RGB") for image in images[start : start + self.batch_size]]
            pixels_BCHW = self._image_processor(chunk, return_tensors="pt")["pixel_values"]
            self.prepare()
            parts.append(self._vectors("get_image_features", pixel_values=pixels_BCHW.to(self._model.dtype)))
        return np.concatenate(parts)

    def text_features(self, texts: Sequence[str]) -> Float32Array:
        """(N, d) vectors of length 1; of a text longer than `limit` tokens the rest is not read (see `too_long`)."""
        parts = [np.zeros((0, self.width), np.float32)]
        for start in range(0, len(texts), self.batch_size):
            # Cut and padded to one length; a causal encoder does not see the padding behind a text.
            cut = {"truncation": self.limit is not None, "max_length": self.limit}
            chunk = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(chunk, padding=True, return_tensors="pt", **cut)
            self.prepare()
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            parts.append(self._vectors("get_text_features", input_ids=ids, attention_mask=mask))
        return np.concatenate(parts)

    def _vectors(self, method: str, **inputs: Any) -> Float32Array:
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            output = getattr(self._model, method)(**{name: value.to(device) for name, value in inputs.items()})
            vectors_BD = getattr(output, "pooler_output", output).float()  # an output object since transformers 5
            vectors_BD = vectors_BD / vectors_BD.norm(dim=-1, keepdim=True)
        vectors: Float32Array = vectors_BD.cpu().numpy()
        return vectors

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """The lengths in tokens of those texts that are longer than `limit`, special tokens counted."""
        if self.limit is None or not texts:
            return []
        lengths = [len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        return [length for length in lengths if length > self.limit]

    @property
    def logit_scale(self) -> float:
        """What the model multiplies a cosine by in `logits_per_image`; reads the weights."""
        self.prepare()
        return math.exp(float(self._model.logit_scale.detach().float().cpu()))

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return int(self.config.projection_dim)

    @cached_property
    def limit(self) -> int | None:
        """Tokens of a text that the model reads, special tokens counted; None: no limit is known."""
        return longest(self.tokenizer, self.config.text_config, None)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises RewardError where it cannot be read."""
        if self._given is not None:
            return self._part_of_processor("tokenizer")
        tokenizer = self._read_part("tokenizer", AutoTokenizer)
        if is_hollow(tokenizer):
            raise RewardError(
                f"{self.field}: the tokenizer of {str(self._processor or self.source)!r} knows no words: its files are "
                "missing. Save one there, or name the folder of another: options.processor."
            )
        return tokenizer

    # -- weights ----------------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights, the image processor and the precision: what shapes an image's vector."""
        weights = weights_fingerprint(self.source, self.config, self.revision, self._given)
        return fingerprint.digest("clip", 1, weights, self._image_processor.to_dict(), self.dtype)

    @cached_property
    def text_fingerprint(self) -> str:
        """Over the fingerprint and the tokenizer, which shapes a text's vector."""
        words = sorted(self.tokenizer.get_vocab().items())
        return fingerprint.digest(self.fingerprint, type(self.tokenizer).__name__, words, self.limit)

    def _read_part(self, part: str, reader: Any) -> Any:
        """Image processor or tokenizer, from the folder of the processor if there is one."""
        source, revision = (self._processor, None) if self._processor else (self.source, self.revision)
        return self._read(part, reader, str(source), revision=revision)

    def _part_of_processor(self, part: str) -> Any:
        value = getattr(self._processor, part, None)
        if value is None:
            raise RewardError(
                f"{self.field}: a CLIPModel given as an object needs its processor, which has no {part}; got "
                f"{type(self._processor).__name__}. Give CLIPProcessor(image_processor=…, tokenizer=…) beside it, or "
                "the model's folder."
            )
        return value

    def _read_model(self) -> Any:
        label = f"{self.field}: {self.source!r}"
        model = self._read_weights(CLIPModel, self.source, self.dtype, label, revision=self.revision)
        return model.to(self.device)

    def _unreadable(self, part: str, source: str, error: Exception) -> RewardError:
        reason = f"there is no folder {Path(source).resolve()}"
        if Path(source).is_dir():
            reason = f"its {part} cannot be read: {one_line(error)}"
        elif source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
            reason += ". Put it there, or name another."
        elif HF_HUB_OFFLINE:  # the client's own message is a page, and that it is offline
            reason += (
                f", and the hub's cache has no {part} of that name. "
                "HF_HUB_OFFLINE is set: unset it, or download the model first."
            )
        else:
            reason += f", and the hub gave no {part}: {one_line(error)[:200]}. Check name and network."
        return RewardError(f"{self.field}: {source!r} must be the folder or hub name of a CLIPModel; {reason}")
