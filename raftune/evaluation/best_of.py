"""Unbiased estimates of best-of-k scores from N ≥ k scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raftune.arrays import FloatArray


def best_of_k_estimates(scores: npt.ArrayLike, ks: Sequence[int]) -> FloatArray:
    """(..., len(ks)): for each k the mean, over all subsets of k of the N scores, of the subset's maximum.

    An unbiased estimate of E max_k where the N scores are independent draws of one policy, N was fixed beforehand and
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
    return ascending @ _weights(n, ks)


def pass_at_k(n: int, successes: int, k: int) -> float:
    """The probability that k of n answers, without replacement, hold a success: 1 − C(n−successes, k)/C(n, k)."""
    return float(best_of_k_estimates(np.repeat([0.0, 1.0], [n - successes, successes]), [k])[0])


def _weights(n: int, ks: Sequence[int]) -> FloatArray:
    """(n, len(ks)) the weight of the i-th smallest of n scores in the estimate for k; each column sums to 1.

    From the largest down: w_n = k/n and w_{j−1} = w_j · (j−k)/(j−1), so that no binomial coefficient can overflow.
    """
    j = np.arange(n, 1, -1)[:, None]
    k = np.asarray(ks)[None, :]
    steps = np.maximum(j - k, 0) / (j - 1)
    return np.cumprod(np.concatenate((k / n, steps)), axis=0)[::-1]
