"""Metrics on held-out ratings: error against the mean, rank correlation, deciles and length bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from raftune.arrays import FloatArray, IntArray
from raftune.config.evaluation import FEWEST_UNITS
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt, resamples
from raftune.reward_models.pairwise import right

GROUPS = 10


def pointwise_report(
    scores_N: FloatArray, ratings_N: FloatArray, lengths_N: FloatArray, prompts_N: IntArray, mean: float, std: float
) -> dict[str, Any]:
    """Everything that is told of N held-out ratings, in the ratings' own unit, with intervals over prompts.

    scores_N: in standard deviations from the mean of the training ratings, which `mean` and `std` describe.
    """
    predicted = mean + std * scores_N
    return {
        "mse": interval(mean_by_prompt(prompts_N, (ratings_N - predicted) ** 2)),
        "mse_of_mean": interval(mean_by_prompt(prompts_N, (ratings_N - mean) ** 2)),
        "r2": explained(ratings_N, predicted, mean, prompts_N),
        "pearson": correlation(predicted, ratings_N),
        "spearman": correlation(ranks(predicted), ranks(ratings_N)),
        "pair_accuracy": pair_accuracy(predicted, ratings_N, prompts_N),
        "calibration": deciles(predicted, ratings_N),
        "length": {
            "spearman_with_score": correlation(ranks(lengths_N), ranks(predicted)),
            "spearman_with_rating": correlation(ranks(lengths_N), ranks(ratings_N)),
        },
        "ratings": {"mean": mean, "std": std},
    }


def explained(ratings: FloatArray, predicted: FloatArray, mean: float, prompts_N: IntArray) -> Interval | None:
    """R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)², where ȳ is the mean of the training ratings: 0 is no better than that mean.

    Prompts are resampled whole; None where all held-out ratings are that mean.
    """
    size = int(prompts_N.max()) + 1
    left = np.bincount(prompts_N, (ratings - predicted) ** 2, size)
    whole = np.bincount(prompts_N, (ratings - mean) ** 2, size)
    if not whole.sum():
        return None
    mean_r2 = float(1 - left.sum() / whole.sum())
    if size < FEWEST_UNITS:
        return Interval(mean=mean_r2, low=None, high=None, n=size)
    drawn = [(left[rows].sum(axis=1), whole[rows].sum(axis=1)) for rows in resamples(size)]
    above, below = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    values = 1 - above[below > 0] / below[below > 0]
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(mean=mean_r2, low=float(low), high=float(high), n=size)


def correlation(x: FloatArray, y: FloatArray) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 2 or not x.std() or not y.std():
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0 on; ties get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def pair_accuracy(predicted: FloatArray, ratings: FloatArray, prompts_N: IntArray) -> Interval | None:
    """How often the better rated of two answers to one prompt scores higher; None where no prompt has two."""
    means = [pairs_right(predicted[prompts_N == p], ratings[prompts_N == p]) for p in repeated(prompts_N)]
    return interval(np.array(means, dtype=np.float64))


def repeated(prompts_N: IntArray) -> IntArray:
    """The prompts that have several rows."""
    prompts, counts = np.unique(prompts_N, return_counts=True)
    return np.asarray(prompts[counts > 1], dtype=np.int64)


def pairs_right(predicted: FloatArray, ratings: FloatArray) -> float:
    """Over all pairs of answers whose ratings differ; NaN where none do."""
    first, second = np.triu_indices(len(ratings), 1)
    gap = ratings[first] - ratings[second]
    agreement = right((predicted[first] - predicted[second]) * np.sign(gap))[gap != 0]
    return float(agreement.mean()) if len(agreement) else float("nan")


def deciles(predicted: FloatArray, ratings: FloatArray) -> dict[str, Any]:
    """Mean prediction and mean rating of the rows in groups of like prediction, from the lowest to the highest."""
    order = np.argsort(predicted, kind="stable")
    groups = [group for group in np.array_split(order, GROUPS) if len(group)]
    bins = [
        {"rows": len(g), "predicted": float(predicted[g].mean()), "rating": float(ratings[g].mean())} for g in groups
    ]
    error = sum(one["rows"] * abs(one["predicted"] - one["rating"]) for one in bins) / len(predicted)
    return {"bins": bins, "expected_error": float(error)}
