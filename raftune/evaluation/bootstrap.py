"""Bootstrap 95 % intervals of a mean, resampled by prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TypedDict

import numpy as np

from raftune.arrays import FloatArray, IntArray
from raftune.config.evaluation import FEWEST_UNITS
from raftune.records import derive_seed

RESAMPLES = 2000
BLOCK = 1_000_000


class Interval(TypedDict):
    """mean, the ends of its 95 % interval, and the number of prompts it stands on: None for fewer than FEWEST_UNITS.

    The bootstrap of so few is too narrow by far: even the whole range of n values holds the median with a chance of
    only 1 - 2^(1-n), .875 at n = 4.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def interval(values: FloatArray) -> Interval | None:
    """The interval of the mean of (P,) values, one a prompt; what is not finite is left out; None with nothing left.

    Percentile bootstrap with a fixed seed: the same values give the same interval.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    mean = float(values.mean())
    if len(values) < FEWEST_UNITS:
        return Interval(mean=mean, low=None, high=None, n=len(values))
    means = np.concatenate([values[rows].mean(axis=1) for rows in resamples(len(values))])
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean=mean, low=float(low), high=float(high), n=len(values))


def ratio_interval(above: FloatArray, below: FloatArray) -> Interval | None:
    """The interval of Σ above / Σ below over (P,) prompts, such as nats over tokens; None where nothing is left.

    A prompt whose values are not finite, or that has nothing below, is left out.
    """
    usable = np.isfinite(above) & np.isfinite(below) & (below > 0)
    above, below = above[usable], below[usable]
    if not len(above):
        return None
    mean = float(above.sum() / below.sum())
    if len(above) < FEWEST_UNITS:
        return Interval(mean=mean, low=None, high=None, n=len(above))
    ratios = np.concatenate([above[rows].sum(axis=1) / below[rows].sum(axis=1) for rows in resamples(len(above))])
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Interval(mean=mean, low=float(low), high=float(high), n=len(above))


def resamples(n: int) -> Iterable[IntArray]:
    """For each of the RESAMPLES, n numbers below n, in blocks near 8 MB; they depend on n alone."""
    return one_block(n) if RESAMPLES * n <= BLOCK else draw_blocks(n)


@lru_cache(maxsize=1)
def one_block(n: int) -> list[IntArray]:
    """The same for every metric of an evaluation, hence kept."""
    return list(draw_blocks(n))


def draw_blocks(n: int) -> Iterator[IntArray]:
    generator = np.random.Generator(np.random.Philox(derive_seed("bootstrap", n)))
    size = max(1, min(RESAMPLES, BLOCK // n))
    for at in range(0, RESAMPLES, size):
        yield generator.integers(0, n, (min(size, RESAMPLES - at), n))


def mean_by_prompt(groups: IntArray, values: FloatArray) -> FloatArray:
    """(P,) means of the finite values of each prompt; NaN for a prompt without one."""
    finite = np.isfinite(values)
    size = int(groups.max(initial=-1)) + 1
    count = np.bincount(groups[finite], minlength=size)
    total = np.bincount(groups[finite], weights=values[finite], minlength=size)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count, dtype=np.float64)
