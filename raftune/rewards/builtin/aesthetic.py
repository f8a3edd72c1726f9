"""Reward `aesthetic`: a small network on the CLIP vector of an image."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import numpy as np
from pydantic import Field

from raftune.arrays import Float32Array, FloatArray
from raftune.config.rewards import derived_name
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.batch import images
from raftune.rewards.builtin.models import ClipReward, Dtype, ImageBatch, Revision
from raftune.rewards.outcome import one_line
from raftune.rewards.registry import builtin
from raftune.store.files import dump_json

Layer = tuple[Float32Array, Float32Array]  # weight (out, in), bias (out)
Activation = Literal["none", "relu"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PUBLISHED_CLIP = "openai/clip-vit-large-patch14"  # what the published predictor reads its images with


@builtin("aesthetic", media=("image",), example={"model": "aesthetic_head.safetensors"}, model_type="aesthetic")
@dataclass
class AestheticReward(ClipReward):
    """Aesthetic quality of an image: a small network on its CLIP vector, independent of the prompt."""

    model: Annotated[
        str,
        Field(
            description="A folder written by `save_head`, or a safetensors file of linear layers (layers.N.weight, "
            "layers.N.bias), like the published aesthetic predictor."
        ),
    ]
    clip: Annotated[
        str | None,
        Field(
            description="Folder or hub name of the CLIPModel that the head needs. null: as in the folder; for a "
            "bare file the published predictor's."
        ),
    ] = None
    batch_size: ImageBatch = 32
    dtype: Dtype = "float32"
    revision: Revision = None

    def load(self, name: str | None = None, device: str = "auto") -> Self:
        """Reads head and CLIP configuration. Raises RewardError if they cannot be read or do not fit each other."""
        from raftune.rewards.builtin.clip import ClipModel

        self.name = name or derived_name(self.model)
        self.head = load_head(self.model)
        source = self.clip or self.head.clip or PUBLISHED_CLIP
        if self.clip is None and self.head.clip and (Path(self.model).expanduser() / self.head.clip).is_dir():
            source = str(Path(self.model).expanduser() / self.head.clip)  # a path that begins in the head's folder
        self.clip_model = ClipModel(
            source, device, self.dtype, revision=self.revision, batch_size=self.batch_size, field="aesthetic"
        )
        if self.head.sizes[0] != self.clip_model.width:
            raise RewardError(
                f"aesthetic: the head {self.model!r} reads vectors of {self.head.sizes[0]} numbers, and {source!r} "
                f"gives {self.clip_model.width}. Name the CLIPModel that it was fitted to: options.clip."
            )
        return self

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        vectors_ND = self.clip_model.image_features(images(completions, self.name))
        return [float(value) for value in self.head(vectors_ND)]

    @cached_property
    def fingerprint(self) -> str:
        """Over the head's numbers, the CLIPModel's weights and how it reads an image."""
        arrays = itertools.chain.from_iterable(self.head.layers)
        numbers = [[list(array.shape), fingerprint.of_bytes(array.tobytes())] for array in arrays]
        return fingerprint.digest("aesthetic", 1, numbers, self.head.activation, self.clip_model.fingerprint)


@dataclass(frozen=True)
class AestheticHead:
    """Linear layers, each but the last followed by the activation; the last gives one number."""

    layers: tuple[Layer, ...]
    activation: Activation = "none"
    clip: str | None = None

    def __call__(self, vectors_ND: Float32Array) -> FloatArray:
        """(N,) a number for each vector of length 1, in the range of the ratings that the head was fitted to."""
        values = vectors_ND.astype(np.float64)
        for number, (weight, bias) in enumerate(self.layers, 1):
            values = values @ weight.T.astype(np.float64) + bias
            if self.activation == "relu" and number < len(self.layers):
                values = np.maximum(values, 0.0)
        return np.asarray(values[:, 0])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that each layer reads, and the one that the last gives."""
        return (*(weight.shape[1] for weight, _ in self.layers), self.layers[-1][0].shape[0])


def save_head(
    folder: Path, layers: Sequence[tuple[Any, Any]], *, clip: str | None, activation: Activation = "none"
) -> None:
    """Writes model.safetensors (`layers.0.weight`, `layers.0.bias`, …) and config.json into the folder.

    `layers` are pairs of weight (out, in) and bias (out,), the first to the last. `clip` is the CLIPModel whose vectors
    the head reads: a hub name, or a path that begins in the folder (`../reward`). `load_head` reads what this writes.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for number, (weight, bias) in enumerate(layers):
        arrays[f"layers.{number}.weight"] = np.ascontiguousarray(weight, np.float32)
        arrays[f"layers.{number}.bias"] = np.ascontiguousarray(bias, np.float32)
    save_file(arrays, folder / WEIGHTS)
    dump_json(folder / CONFIG, {"model_type": "aesthetic", "activation": activation, "clip": clip})


def load_head(source: str) -> AestheticHead:
    """The head of a folder or a safetensors file. Raises RewardError if its layers do not fit together."""
    from safetensors.torch import load_file

    path = Path(source).expanduser()
    config: dict[str, Any] = {"activation": "none"}
    if path.is_dir():
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            content = f"model_type {config['model_type']!r} with activation {config['activation']!r}"
            valid = config["model_type"] == "aesthetic" and config["activation"] in get_args(Activation)
        except (OSError, ValueError, KeyError, TypeError) as error:
            content, valid = one_line(error), False
        if not valid:
            raise RewardError(
                f"aesthetic: {path / CONFIG} must say model_type: aesthetic and activation: none or relu; got "
                f"{content}. Write it with save_head, or name the safetensors file itself."
            )
    try:
        tensors = load_file(path / WEIGHTS if path.is_dir() else path)
        arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    except Exception as error:
        raise RewardError(
            f"aesthetic: options.model must name a folder with {WEIGHTS}, or a safetensors file; {source!r} cannot be "
            f"read: {one_line(error)}. Convert a .pth file with safetensors.torch.save_file."
        ) from None
    numbered: dict[int, dict[str, Float32Array]] = {}
    for name, array in arrays.items():
        if (match := re.match(r"^(?:.*\.)?(\d+)\.(weight|bias)$", name)) is None:
            raise RewardError(
                f"aesthetic: {source!r} holds {name!r}, and a head holds linear layers only: layers.0.weight, "
                "layers.0.bias, and so on. Name the file of a head."
            )
        numbered.setdefault(int(match[1]), {})[match[2]] = array  # not consecutive if a dropout stood between
    layers = []
    for _, layer in sorted(numbered.items()):
        weight, bias = layer.get("weight"), layer.get("bias")
        if weight is not None and bias is not None and weight.ndim == 2 and bias.shape == weight.shape[:1]:
            layers.append((weight, bias))
    fits = all(before.shape[0] == after.shape[1] for (before, _), (after, _) in itertools.pairwise(layers))
    if not layers or len(layers) != len(numbered) or not fits or layers[-1][0].shape[0] != 1:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in sorted(arrays.items()))
        raise RewardError(
            f"aesthetic: each layer of {source!r} must read what the one before gives, and the last must give one "
            f"number; got {shapes or 'nothing'}. Save the head again."
        )
    return AestheticHead(tuple(layers), config["activation"], config.get("clip"))
