"""Reward `aesthetic`: a small network on the CLIP vector of an image."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from raftune.arrays import Float32Array, FloatArray
from raftune.config.rewards import derived_name
from raftune.errors import RewardError
from raftune.rewards import fingerprint
from raftune.rewards.builtin.clip import ClipModel, ClipReward
from raftune.rewards.builtin.model_options import AestheticOptions
from raftune.rewards.media import pictures
from raftune.rewards.outcome import one_line
from raftune.store.files import dump_json

Layer = tuple[Float32Array, Float32Array]  # weight (out, in), bias (out)
Activation = Literal["none", "relu"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
PUBLISHED_CLIP = "openai/clip-vit-large-patch14"  # what the published predictor reads its images with
NAME = re.compile(r"^(?:.*\.)?(\d+)\.(weight|bias)$")


@dataclass(frozen=True)
class AestheticHead:
    """Linear layers, each followed by the activation but for the last, which gives one number."""

    layers: tuple[Layer, ...]
    activation: Activation = "none"
    clip: str | None = None

    def __call__(self, vectors_ND: Float32Array) -> FloatArray:
        """(N,) a number for each vector of length 1; the range is that of the ratings which the head was fitted to."""
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


class AestheticReward(ClipReward):
    """A number for each image alone, whatever its prompt, on the scale of the ratings that the head was fitted to.

    The head and the CLIPModel's configuration are read at once, its weights by `prepare` or the first call. Raises
    RewardError where they cannot be read, or do not fit each other.
    """

    def __init__(self, options: AestheticOptions, *, name: str | None = None, device: str = "auto") -> None:
        self.name = name or derived_name(options.model)
        self.head = load_head(options.model)
        source = options.clip or clip_of(self.head, options.model)
        self.clip = ClipModel(
            source, device, options.dtype, revision=options.revision, batch_size=options.batch_size, field="aesthetic"
        )
        if self.head.sizes[0] != self.clip.width:
            raise RewardError(
                f"aesthetic: the head {options.model!r} reads vectors of {self.head.sizes[0]} numbers, and {source!r} "
                f"gives {self.clip.width}. Name the CLIPModel that it was fitted to: options.clip."
            )

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return [float(value) for value in self.head(self.clip.image_features(pictures(completions, self.name)))]

    @cached_property
    def fingerprint(self) -> str:
        """Over the head's numbers, the CLIPModel's weights and how it reads an image."""
        numbers = [[list(array.shape), fingerprint.of_bytes(array.tobytes())] for array in chain(self.head.layers)]
        return fingerprint.digest("aesthetic", 1, numbers, self.head.activation, self.clip.fingerprint)


def chain(layers: Sequence[Layer]) -> itertools.chain[Float32Array]:
    """Weight and bias of each layer in turn."""
    return itertools.chain.from_iterable(layers)


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
    told = {"model_type": "aesthetic", "activation": activation, "clip": clip}
    dump_json(folder / CONFIG, told)


def load_head(source: str) -> AestheticHead:
    """The head of a folder, or of a bare safetensors file. Raises RewardError where its layers do not fit together."""
    from safetensors.torch import load_file

    place = Path(source).expanduser()
    told = read_config(place / CONFIG) if place.is_dir() else {}
    path = place / WEIGHTS if place.is_dir() else place
    try:
        found = {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
    except Exception as error:
        raise RewardError(
            f"aesthetic: options.model must name a folder with {WEIGHTS}, or a safetensors file; {source!r} cannot be "
            f"read: {one_line(error)}. Convert a .pth file with safetensors.torch.save_file."
        ) from None
    layers = layers_of(found, source)
    return AestheticHead(layers, told.get("activation", "none"), told.get("clip"))


def layers_of(arrays: dict[str, Float32Array], source: str) -> tuple[Layer, ...]:
    """The layers in the order of their numbers; numbers may be missing, where a dropout or an activation stood."""
    found: dict[int, dict[str, Float32Array]] = {}
    for name, array in arrays.items():
        if (match := NAME.match(name)) is None:
            raise RewardError(
                f"aesthetic: {source!r} holds {name!r}, and a head holds linear layers only: layers.0.weight, "
                "layers.0.bias, and so on. Name the file of a head."
            )
        found.setdefault(int(match[1]), {})[match[2]] = array
    layers = tuple((both.get("weight"), both.get("bias")) for _, both in sorted(found.items()))
    whole = [(w, b) for w, b in layers if w is not None and b is not None and w.ndim == 2 and b.shape == w.shape[:1]]
    fits = all(before.shape[0] == after.shape[1] for (before, _), (after, _) in itertools.pairwise(whole))
    if not whole or len(whole) != len(layers) or not fits or whole[-1][0].shape[0] != 1:
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in sorted(arrays.items()))
        raise RewardError(
            f"aesthetic: each layer of {source!r} must read what the one before gives, and the last must give one "
            f"number; got {shapes or 'nothing'}. Save the head again."
        )
    return tuple(whole)


def read_config(path: Path) -> dict[str, Any]:
    """What the folder says of its head. Raises RewardError where that cannot be meant."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["model_type"] == "aesthetic" and told["activation"] in get_args(Activation):
            return dict(told)
        what = f"model_type {told['model_type']!r} with activation {told['activation']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = one_line(error)
    raise RewardError(
        f"aesthetic: {path} must say model_type: aesthetic and activation: none or relu; got {what}. Write it with "
        "save_head, or name the safetensors file itself."
    )


def clip_of(head: AestheticHead, source: str) -> str:
    """The CLIPModel that the head reads: beside its folder where the name is a path that leads to one."""
    if head.clip is None:
        return PUBLISHED_CLIP
    beside = Path(source).expanduser() / head.clip
    return str(beside) if beside.is_dir() else head.clip
