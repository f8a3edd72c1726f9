"""Two readers of handwriting, each of which has seen the half of scikit-learn's digits that the other has not."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

HALF = 900


@cache
def reader(name: str) -> Any:
    pixels, labels = load_digits(return_X_y=True)
    if name == "reward":
        return LogisticRegression(C=0.01, max_iter=500).fit(pixels[:HALF], labels[:HALF])
    return SVC(gamma=0.001, C=10).fit(pixels[HALF:], labels[HALF:])


def as_read(images: list[Image.Image]) -> np.ndarray:
    """(N, 64) pixels in 0 … 16, as scikit-learn has them."""
    return np.stack([np.asarray(image.convert("L"), dtype=float).reshape(64) / 255 * 16 for image in images])


def confidence(prompts: list[int], completions: list[Image.Image], **columns: Any) -> list[float]:
    """The probability that an image shows the prompted digit."""
    return reader("reward").predict_proba(as_read(completions))[np.arange(len(prompts)), prompts].tolist()


def right(prompts: list[int], completions: list[Image.Image], **columns: Any) -> list[float]:
    """1 where the judge, which is never trained on, reads the prompted digit, else 0."""
    return (reader("judge").predict(as_read(completions)) == prompts).astype(float).tolist()
