"""A mean with its 95 % interval: the bootstrap over prompts, because samples of one prompt are not independent."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt

from raftune.records import derive_seed

RESAMPLES = 2000


class Interval(TypedDict):
    """mean, the ends of its 95 % interval, and the number of prompts it stands on."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: npt.NDArray[np.float64]) -> Interval | None:
    """The interval of the mean of (P,) values, one a prompt; what is not finite is left out; None with nothing left.

    Percentile bootstrap with a fixed seed: the same values give the same interval.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    generator = np.random.Generator(np.random.Philox(derive_seed("bootstrap", len(values))))
    means = np.concatenate(
        [values[generator.integers(0, len(values), (block, len(values)))].mean(axis=1) for block in blocks(len(values))]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), n=len(values))


def blocks(width: int) -> list[int]:
    """Sizes of blocks of resamples that keep a block near 8 MB."""
    size = max(1, min(RESAMPLES, 1_000_000 // width))
    return [min(size, RESAMPLES - at) for at in range(0, RESAMPLES, size)]


def mean_by_prompt(groups: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(P,) means of the finite values of each prompt; NaN for a prompt without one."""
    finite = np.isfinite(values)
    size = int(groups.max(initial=-1)) + 1
    count = np.bincount(groups[finite], minlength=size)
    total = np.bincount(groups[finite], weights=values[finite], minlength=size)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count, dtype=np.float64)
