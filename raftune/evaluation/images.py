"""Metrics of images, computed from pixels or feature vectors.

Colours are as stored (sRGB), 0 … 1. The metrics of an image are computed once, where its bytes are read. Shapes:
N images, K of one prompt, P prompts, D numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.data.images import LUMA, LazyImages, require_pillow
from raftune.evaluation.bootstrap import interval, mean_by_prompt, numbers_of, prompt_numbers
from raftune.records import INVALID, LATENTS

SIDE = 16  # pixels of the thumbnails that images are compared by
ALIKE = 0.03  # root mean square distance of two thumbnails up to which one image nearly repeats the other
BLOCK = 1024  # thumbnails compared at once
LOOKS = ("brightness", "saturation", "contrast", "saturated_ratio")  # the numbers of one image
THUMBNAIL, FEATURES, FEATURES_START = "thumbnail", "features", "features_start"
_PAYLOAD = ("completion", LATENTS)  # what takes the space
_LOOK = pa.schema([*(pa.field(name, pa.float64()) for name in LOOKS), pa.field(THUMBNAIL, pa.binary(SIDE * SIDE * 3))])


def looked_at(samples: pa.Table) -> pa.Table:
    """The samples with what they look like, null for those that are no image, in place of their bytes and latents.

    LOOKS: mean luma; mean HSV saturation; standard deviation of the luma, at most 0.5; share of pixels with a channel
    at 0 or 255. THUMBNAIL: (SIDE, SIDE, 3) bytes.
    """
    kept = samples.drop_columns([name for name in _PAYLOAD if name in samples.column_names])
    images = LazyImages(samples.column("completion"), samples.column("sample_id"))
    valid = samples.column("completion").is_valid()
    if INVALID in samples.column_names:
        valid = pc.and_(valid, samples.column(INVALID).is_null())
    rows = [look_of(images[i]) if fit else {} for i, fit in enumerate(valid.to_pylist())]
    looks = pa.Table.from_pylist(rows, schema=_LOOK)
    for name in looks.column_names:
        kept = kept.append_column(name, looks.column(name))
    return kept


def look_of(image: Any) -> dict[str, Any]:
    """The numbers of one image, and its thumbnail."""
    pixels = np.asarray(image)
    highest, lowest = pixels.max(axis=-1), pixels.min(axis=-1)
    luma = (pixels @ LUMA) / 255
    small = image.resize((SIDE, SIDE), require_pillow().Resampling.BOX)
    return {
        "brightness": float(luma.mean()),
        "saturation": float(((highest - lowest) / np.maximum(highest, 1)).mean()),
        "contrast": float(luma.std()),
        "saturated_ratio": float(((highest == 255) | (lowest == 0)).mean()),
        THUMBNAIL: small.tobytes(),
    }


# -- several images -------------------------------------------------------------------------------------------------


class PixelMetrics:
    """Pixel metrics of images: colours, distance within a prompt, and near-duplicates; each in 0 … 1."""

    needs = frozenset({"image"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        groups, rows, small_ND = prompt_numbers(samples), *thumbnails(samples)
        measures: dict[str, Any] = {name: interval(mean_by_prompt(groups, numbers_of(samples, name))) for name in LOOKS}
        measures["pixel_distance"] = interval(by_group(groups[rows], small_ND, rms_distance))
        measures["near_duplicates"] = float((nearest(small_ND)[0] <= ALIKE).mean()) if len(rows) else None
        return measures


class FeatureMetrics:
    """Diversity and distance from the initial model's images, in a model's feature space.

    feature_distance: the mean of 1 - cos over pairs of a prompt's images. vendi: how many different images of a
    prompt there are in effect, 1 … K. feature_drift: the mean of 1 - cos to the start's image of the same prompt and
    seed.
    """

    needs = frozenset({"image", FEATURES})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        groups, rows, vectors_ND = prompt_numbers(samples), *vectors(samples, FEATURES)
        measures: dict[str, Any] = {
            "feature_distance": interval(by_group(groups[rows], vectors_ND, cosine_distance)),
            "vendi": interval(by_group(groups[rows], vectors_ND, vendi_score)),
        }
        if FEATURES_START in samples.column_names:
            places, start_ND = vectors(samples, FEATURES_START)
            both, rows_now, rows_start = np.intersect1d(rows, places, assume_unique=True, return_indices=True)
            cosines = np.einsum("nd,nd->n", vectors_ND[rows_now], start_ND[rows_start]) if len(both) else np.zeros(0)
            measures["feature_drift"] = interval(mean_by_prompt(groups[both], 1 - np.minimum(cosines, 1.0)))
        return measures


def rms_distance(x_KD: FloatArray) -> float:
    """The mean over pairs of the root mean square difference of two rows."""
    squares = (x_KD**2).sum(axis=1)
    apart = np.maximum(squares[:, None] + squares[None] - 2 * x_KD @ x_KD.T, 0.0) / x_KD.shape[1]
    return float(np.sqrt(apart[np.triu_indices(len(x_KD), 1)]).mean())


def cosine_distance(x_KD: FloatArray) -> float:
    """The mean over pairs of 1 - cos; the rows have length 1."""
    k = len(x_KD)
    total = x_KD.sum(axis=0)
    return float(1 - (total @ total - k) / (k * (k - 1)))


def vendi_score(x_KD: FloatArray) -> float:
    """exp of the entropy (nats) of the eigenvalues of the cosine kernel over K; the rows have length 1.

    1 where all are the same, K where all are orthogonal: the number of different rows in effect. Friedman and Dieng,
    The Vendi Score (2023), arXiv 2210.02410.
    """
    values = np.clip(np.linalg.eigvalsh(x_KD @ x_KD.T / len(x_KD)), 0.0, None)
    shares = values[values > 1e-12] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def by_group(groups: IntArray, x_ND: FloatArray, measure: Callable[[FloatArray], float]) -> FloatArray:
    """(P,) the measure of each group's rows; NaN for a group of fewer than two."""
    order = np.argsort(groups, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    return np.array([measure(x_ND[part]) if len(part) > 1 else np.nan for part in parts], dtype=np.float64)


def nearest(small_ND: FloatArray, groups: IntArray | None = None) -> tuple[FloatArray, IntArray]:
    """(N,) the distance of each thumbnail to the nearest other one, of another group where groups are given, and which.

    Root mean square over pixels and channels, 0 … 1; inf where there is no other. In blocks: memory is bounded, time
    goes with N².
    """
    small = small_ND.astype(np.float32)
    squares = (small**2).sum(axis=1)
    best, neighbours = np.full(len(small), np.inf), np.zeros(len(small), np.int64)
    for at in range(0, len(small), BLOCK):
        rows = np.arange(at, min(at + BLOCK, len(small)))
        apart = squares[rows, None] + squares[None] - 2 * small[rows] @ small.T
        if groups is None:
            apart[np.arange(len(rows)), rows] = np.inf
        else:
            apart[groups[rows, None] == groups[None]] = np.inf
        neighbours[rows] = apart.argmin(axis=1)
        best[rows] = apart[np.arange(len(rows)), neighbours[rows]]
    return np.sqrt(np.maximum(best, 0.0) / max(small.shape[1], 1)), neighbours


# -- columns ----------------------------------------------------------------------------------------------------------


def thumbnails(samples: pa.Table) -> tuple[IntArray, FloatArray]:
    """The rows that are images, and (N, SIDE·SIDE·3) their thumbnails in 0 … 1."""
    column = samples.column(THUMBNAIL)
    rows = np.flatnonzero(column.is_valid().to_numpy())
    data = b"".join(column.drop_null().to_pylist())
    return rows, np.frombuffer(data, np.uint8).reshape(len(rows), SIDE * SIDE * 3) / 255


def vectors(samples: pa.Table, name: str) -> tuple[IntArray, FloatArray]:
    """The rows that have a vector, and (N, d) these, made of length 1."""
    column = samples.column(name)
    rows = np.flatnonzero(column.is_valid().to_numpy())
    flat = pc.list_flatten(column.drop_null().combine_chunks()).to_numpy(zero_copy_only=False)
    x_ND = np.asarray(flat, np.float64).reshape(len(rows), len(flat) // max(len(rows), 1))
    return rows, x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
