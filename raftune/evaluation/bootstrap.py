"""Means by prompt, their bootstrap 95 % intervals, and unbiased best-of-k estimates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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
    return (
        _bootstrap(len(values), float(values.mean()), lambda rows: values[rows].mean(axis=1)) if len(values) else None
    )


def ratio_interval(above: FloatArray, below: FloatArray) -> Interval | None:
    """The interval of Σ above / Σ below over (P,) prompts, such as nats over tokens; None where nothing is left.

    A prompt whose values are not finite, or that has nothing below, is left out.
    """
    usable = np.isfinite(above) & np.isfinite(below) & (below > 0)
    above, below = above[usable], below[usable]
    if not len(above):
        return None
    mean = float(above.sum() / below.sum())
    return _bootstrap(len(above), mean, lambda rows: above[rows].sum(axis=1) / below[rows].sum(axis=1))


def _bootstrap(n: int, mean: float, statistic: Callable[[IntArray], FloatArray]) -> Interval:
    if n < FEWEST_UNITS:
        return Interval(mean=mean, low=None, high=None, n=n)
    low, high = np.quantile(np.concatenate([statistic(rows) for rows in resamples(n)]), (0.025, 0.975))
    return Interval(mean=mean, low=float(low), high=float(high), n=n)


def resamples(n: int) -> Iterator[IntArray]:
    """For each of the RESAMPLES, n numbers below n, in blocks near 8 MB; they depend on n alone."""
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


# -- columns of a table of samples ------------------------------------------------------------------------------------


def numbers_by_key(keys: pa.Array | pa.ChunkedArray) -> IntArray:
    """For each key the number of its value, in order of appearance."""
    codes = (keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys).dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return np.asarray(codes.indices.to_numpy(), dtype=np.int64)


def prompt_numbers(samples: pa.Table) -> IntArray:
    """For each row the number of its prompt, in order of appearance."""
    return numbers_by_key(samples.column("prompt_id"))


def numbers_of(samples: pa.Table, name: str) -> FloatArray:
    """The column as numbers, NaN where it is null."""
    return np.asarray(pc.cast(samples.column(name), pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def usable(samples: pa.Table, column: str, status: str) -> FloatArray:
    """The column's numbers, NaN where the status is not ok."""
    ok = pc.equal(samples.column(status), "ok").to_numpy(zero_copy_only=False)
    return np.where(ok, numbers_of(samples, column), np.nan)


# -- best of k --------------------------------------------------------------------------------------------------------


def ks_up_to(most: int) -> list[int]:
    """1, 2, 4, … and the most; none for 0."""
    return sorted({*(2**i for i in range(most.bit_length())), *({most} if most else ())})


def best_of_k_estimates(scores: npt.ArrayLike, ks: Sequence[int]) -> FloatArray:
    """(..., len(ks)): for each k the mean, over all subsets of k of the N scores, of the subset's maximum.

    An unbiased estimate of E max_k where the N scores are independent samples of one policy, N was fixed beforehand and
    nothing was filtered: no teacher's or human's answers, no scores left out. scores: (..., N), finite. Raises
    ValueError for a k outside 1..N or a score that is not finite. For scores 0 and 1 it is pass@k (Chen et al. 2021).

    With r_(1) ≤ … ≤ r_(N) it is Σ_{i≥k} C(i−1, k−1)/C(N, k) · r_(i): r_(i) leads C(i−1, k−1) of the subsets.
    """
    ascending = np.sort(np.asarray(scores, np.float64), axis=-1)
    n = ascending.shape[-1]
    if not all(1 <= k <= n for k in ks):
        raise ValueError(f"ks must lie in 1..{n}, the number of scores; got {list(ks)}. Generate more samples.")
    if not np.isfinite(ascending).all():
        raise ValueError("scores must be finite; got NaN or infinity. Leaving them out would bias the estimate.")
    # (n, len(ks)) weights, from the largest score down: w_n = k/n and w_{j−1} = w_j · (j−k)/(j−1), so that no binomial
    # coefficient can overflow.
    j, k = np.arange(n, 1, -1)[:, None], np.asarray(ks)[None, :]
    weights = np.cumprod(np.concatenate((k / n, np.maximum(j - k, 0) / (j - 1))), axis=0)[::-1]
    return np.asarray(ascending @ weights)
