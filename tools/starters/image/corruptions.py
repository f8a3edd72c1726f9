"""Images that went wrong, as models get them wrong: what a sense of quality is taught on. Torch-free."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from raftune.starters.image.images import SIZE, Pixels, Scene, paint

Spoil = Callable[[Pixels, np.random.Generator], Pixels]


def blurred(image: Pixels, rng: np.random.Generator) -> Pixels:
    sd = rng.uniform(1.4, 2.6)
    taps = np.exp(-0.5 * (np.arange(-8, 9) / sd) ** 2)
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="edge")
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, taps / taps.sum(), mode="same")
    return padded[8:-8, 8:-8].astype(np.float32)


def noisy(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Coarse grain: what is left of noise after a denoiser that stopped early."""
    coarse = rng.normal(0, rng.uniform(0.15, 0.35), (SIZE // 2, SIZE // 2, 3)).repeat(2, 0).repeat(2, 1)
    return np.clip(image + coarse, 0, 1).astype(np.float32)


def torn(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Bands of rows or of columns, each moved by itself."""
    axis, found = int(rng.integers(2)), image.copy()
    edges = np.sort(rng.choice(np.arange(3, SIZE - 3), 4, replace=False))
    for band in np.split(np.arange(SIZE), edges):
        moved = int(rng.integers(3, 9)) * int(rng.choice((-1, 1)))
        where = (band, slice(None)) if axis == 0 else (slice(None), band)
        found[where] = np.roll(image, moved, 1 - axis)[where]
    return found


def washed_out(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Little of the contrast is left, around one level."""
    level, left = rng.uniform(0.3, 0.8), rng.uniform(0.15, 0.4)
    return (level + left * (image - level)).astype(np.float32)


def patchy(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Squares of other tints lie over the background and the shape."""
    found = image.copy()
    for _ in range(int(rng.integers(2, 6))):
        side = int(rng.integers(3, 10))
        x, y = rng.integers(0, SIZE - side, 2)
        mixed = rng.uniform(0.5, 1)
        found[y : y + side, x : x + side] *= 1 - mixed
        found[y : y + side, x : x + side] += mixed * rng.uniform(0, 1, 3)
    return found


WAYS: Final[tuple[Spoil, ...]] = (blurred, noisy, torn, washed_out, patchy)


def spoiled(chosen: Sequence[Scene], rng: np.random.Generator, radius: tuple[float, float]) -> Pixels:
    """(N, SIZE, SIZE, 3) in 0…1: images of these scenes, each spoiled in one way; one in six has its shape twice."""
    offsets_N2 = rng.uniform(4, 13, (len(chosen), 2)) * rng.choice((-1, 1), (len(chosen), 2))
    offsets_N2[np.arange(len(chosen)), rng.integers(2, size=len(chosen))] *= rng.uniform(0, 1, len(chosen))
    twice_NHW3 = paint(chosen, rng, radius, doubled=offsets_N2)
    ways = rng.integers(len(WAYS) + 1, size=len(chosen))
    whole_NHW3 = paint(chosen, rng, radius)
    pairs = zip(ways, whole_NHW3, twice_NHW3, strict=True)
    return np.stack([WAYS[way](one, rng) if way < len(WAYS) else two for way, one, two in pairs])
