"""Example samples for `reward check`, including unusual ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from raftune.data.images import require_pillow
from raftune.rewards.batch import RewardBatch

TEXTS = [
    *("The answer is 42.", "", "I do not know.", "#### 1,000", "Yes", "no", "\\boxed{7}", "word " * 200),
    *("Naïve — 東京 🙂", "<think>a</think> b", "  spaced  ", "Line one.\nLine two.", "42", "-3.5", "Well.", "A a A a"),
]
LONG = "a large green square to the left of " + "a very small blue ring and " * 30
CAPTIONS = ("a red disc", "nothing at all", "x", LONG)
SIZES = ((64, 64), (48, 32), (20, 100), (7, 5))  # pixels: width, height


def example_batch() -> RewardBatch:
    """Sixteen short completions: empty, long, without a number, beyond ASCII."""
    count = len(TEXTS)
    answers = ["42", "1000", None, "7"] * (count // 4)
    ids = [list(range(1, len(text.split()) + 2)) for text in TEXTS]
    return RewardBatch(["What is the answer?"] * count, list(TEXTS), {"answer": answers, "solution": answers}, ids)


def example_images(*, mixed_sizes: bool = False) -> RewardBatch:
    """Sixteen images of 64 x 64 pixels, or of four sizes: flat, noise, gradients, discs; one caption is very long."""
    random = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
    arrays = []
    for i in range(4):
        colour = np.roll(np.array([230.0, 120.0, 20.0]), i) * (i < 3)  # the fourth is black
        disc = ((across - 0.3 - 0.1 * i) ** 2 + (down - 0.5) ** 2 < 0.04)[..., None]
        slope = (across if i % 2 else down)[..., None]
        noise = random.integers(0, 256, (64, 64, 3))
        flat = np.broadcast_to(colour, (64, 64, 3))
        arrays += [flat, noise, slope * np.maximum(colour, 60), np.where(disc, colour, 200)]
    images: list[Any] = [require_pillow().fromarray(np.asarray(pixels).astype(np.uint8)) for pixels in arrays]
    if mixed_sizes:
        images = [image.resize(SIZES[i % len(SIZES)]) for i, image in enumerate(images)]
    captions: list[Any] = [CAPTIONS[i // 4] for i in range(len(images))]
    return RewardBatch(captions, images, {"answer": list(captions)})
