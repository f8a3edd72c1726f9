"""Metrics of a reward model on held-out rows, and the check that it is better than chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from raftune.arrays import FloatArray, IntArray
from raftune.config.evaluation import FEWEST_UNITS
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt, resamples
from raftune.results.summary import ends_of, spread

FEWEST = 10  # held-out prompts: below, a bootstrap interval says nothing
BINS = 10  # of confidence in [0.5, 1], and of predictions
# By how much the preferred completion is longer, as a share of the longer one of the two: (name, from, to).
LENGTHS = (
    ("much shorter", -1.01, -0.5),
    ("shorter", -0.5, -0.1),
    ("alike", -0.1, 0.1),
    ("longer", 0.1, 0.5),
    ("much longer", 0.5, 1.01),
)
ONE_SIDED = 0.9  # a model that prefers the longer (or the shorter) completion so often may be measuring nothing else


def verdict(objective: str, report: dict[str, Any]) -> tuple[bool, str]:
    """Whether the model is better than chance, and why in words that may follow "the model"."""
    pairwise = objective == "pairwise"
    measured: Interval | None = report["accuracy" if pairwise else "r2"]
    if measured is None:
        return False, "cannot be judged: all held-out ratings are alike"
    shown = f"{'accuracy' if pairwise else 'R²'} {spread(measured)} on {measured['n']:,} held-out prompts"
    if measured["n"] < FEWEST:
        return False, f"cannot be distinguished from chance: {shown}, and {FEWEST} are needed at least: give more rows"
    chance, ends = 0.5 if pairwise else 0.0, ends_of(measured)
    if ends is None or ends[0] <= chance:
        return False, f"is not better than chance: {shown}, where the interval must lie above {chance:g}"
    if not pairwise or better_than_length(report):
        return True, f"is better than chance: {shown}"
    rule = "longer" if report["length"]["prefers_longer"] >= 0.5 else "shorter"
    gain = spread(report["length"]["gain_over_length"])
    length = f"not than the rule that the {rule} completion wins, over which it gains {gain}"
    return True, f"is better than chance, but {length}: {shown}"


def better_than_length(report: dict[str, Any]) -> bool:
    """Whether a model of preferences ranks more pairs than the rule that the longer (or shorter) completion wins."""
    ends = ends_of(report["length"]["gain_over_length"] or {})
    return ends is not None and ends[0] > 0


def pairwise_report(scores_N2: FloatArray, lengths_N2: FloatArray, prompts_N: IntArray) -> dict[str, Any]:
    """Metrics of N held-out pairs, with intervals by the bootstrap over prompts.

    scores_N2, lengths_N2: of the preferred completion and of the other; lengths in tokens.
    """
    margins = scores_N2[:, 0] - scores_N2[:, 1]
    return {
        "accuracy": by_prompt(right(margins), prompts_N),
        "margin": by_prompt(margins, prompts_N),
        "log_loss": by_prompt(np.logaddexp(0.0, -margins), prompts_N),
        "calibration": calibration(margins),
        "length": length_report(margins, lengths_N2, prompts_N),
    }


def right(margins: FloatArray) -> FloatArray:
    """1 where the preferred completion scores higher, 0 where lower, ½ at a tie."""
    return np.asarray((np.sign(margins) + 1) / 2, dtype=np.float64)


def by_prompt(values: FloatArray, prompts_N: IntArray) -> Interval | None:
    """The interval of the mean over prompts of the mean of each prompt's rows."""
    return interval(mean_by_prompt(prompts_N, values))


def calibration(margins: FloatArray) -> dict[str, Any]:
    """Accuracy by the model's confidence sigmoid(|margin|), in [½, 1], of Bradley-Terry.

    The expected calibration error is the mean of |accuracy - confidence| over bins, by pairs.
    """
    confidence, correct = 1 / (1 + np.exp(-np.abs(margins))), right(margins)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    at = np.clip(np.digitize(confidence, edges) - 1, 0, BINS - 1)
    bins: list[dict[str, Any]] = []
    for i in range(BINS):
        pairs = int((at == i).sum())
        means = {"confidence": confidence[at == i], "accuracy": correct[at == i]}
        bins.append(
            {"from": round(float(edges[i]), 2), "to": round(float(edges[i + 1]), 2), "pairs": pairs}
            | {name: float(values.mean()) if pairs else None for name, values in means.items()}
        )
    error = sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["pairs"]) / len(margins)
    return {
        "bins": bins,
        "expected_error": float(error),
        "confidence": float(confidence.mean()),
        "accuracy": float(correct.mean()),
    }


def length_report(margins: FloatArray, lengths_N2: FloatArray, prompts_N: IntArray) -> dict[str, Any]:
    """Accuracy by how much longer the preferred completion is, beside the rule that the longer completion wins.

    `only_length` is True where that rule (or its reverse) does as well within the interval, and the model nearly always
    agrees with it.
    """
    longer, correct = lengths_N2[:, 0] - lengths_N2[:, 1], right(margins)
    share = longer / np.maximum(lengths_N2.max(axis=1), 1)
    bins = []
    for name, low, high in LENGTHS:
        inside = (share >= low) & (share < high)
        accuracy = by_prompt(correct[inside], prompts_N[inside]) if inside.any() else None
        bins.append({"preferred": name, "pairs": int(inside.sum()), "accuracy": accuracy})
    rule, agreement = right(longer), float(right(margins * np.sign(longer)).mean())
    gain = by_prompt(correct - (1 - rule if agreement < 0.5 else rule), prompts_N)
    one_sided = max(agreement, 1 - agreement) >= ONE_SIDED
    return {
        "bins": bins,
        "longer_wins": by_prompt(rule, prompts_N),
        "prefers_longer": agreement,
        "gain_over_length": gain,
        "only_length": bool(one_sided and gain is not None and (gain["low"] is None or gain["low"] <= 0)),
    }


def pointwise_report(
    scores_N: FloatArray, ratings_N: FloatArray, lengths_N: FloatArray, prompts_N: IntArray, mean: float, std: float
) -> dict[str, Any]:
    """Metrics of N held-out ratings, in the ratings' own unit, with intervals over prompts.

    scores_N: in standard deviations from the mean of the training ratings, which `mean` and `std` describe.
    """
    predicted = mean + std * scores_N
    by_length, by_score, by_rating = ranks(lengths_N), ranks(predicted), ranks(ratings_N)
    return {
        "mse": by_prompt((ratings_N - predicted) ** 2, prompts_N),
        "mse_of_mean": by_prompt((ratings_N - mean) ** 2, prompts_N),
        "r2": explained(ratings_N, predicted, mean, prompts_N),
        "pearson": correlation(predicted, ratings_N),
        "spearman": correlation(by_score, by_rating),
        "pair_accuracy": pair_accuracy(predicted, ratings_N, prompts_N),
        "calibration": deciles(predicted, ratings_N),
        "length": {
            "spearman_with_score": correlation(by_length, by_score),
            "spearman_with_rating": correlation(by_length, by_rating),
        },
        "ratings": {"mean": mean, "std": std},
    }


def explained(ratings: FloatArray, predicted: FloatArray, mean: float, prompts_N: IntArray) -> Interval | None:
    """R² = 1 - Σ(y - ŷ)² / Σ(y - ȳ)², where ȳ is the mean of the training ratings: 0 is no better than that mean.

    Prompts are resampled whole; None where all held-out ratings are that mean.
    """
    size = int(prompts_N.max()) + 1
    residual = np.bincount(prompts_N, (ratings - predicted) ** 2, size)
    total = np.bincount(prompts_N, (ratings - mean) ** 2, size)
    if not total.sum():
        return None
    r2 = float(1 - residual.sum() / total.sum())
    if size < FEWEST_UNITS:
        return Interval(mean=r2, low=None, high=None, n=size)
    sums = [(residual[rows].sum(axis=1), total[rows].sum(axis=1)) for rows in resamples(size)]
    above, below = (np.concatenate(parts) for parts in zip(*sums, strict=True))
    low, high = np.quantile(1 - above[below > 0] / below[below > 0], (0.025, 0.975))
    return Interval(mean=r2, low=float(low), high=float(high), n=size)


def correlation(x: FloatArray, y: FloatArray) -> float | None:
    """Pearson's r; None where one side does not vary."""
    if len(x) < 2 or not x.std() or not y.std():
        return None
    return float(np.corrcoef(x, y)[0, 1])


def ranks(values: FloatArray) -> FloatArray:
    """Ranks from 0 on; ties get the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - 1 - (counts - 1) / 2)[inverse], dtype=np.float64)


def pair_accuracy(predicted: FloatArray, ratings: FloatArray, prompts_N: IntArray) -> Interval | None:
    """How often the better rated of two completions to one prompt scores higher; None where no prompt has two."""
    means = []
    for prompt in np.flatnonzero(np.bincount(prompts_N) > 1):
        scores, rated = predicted[prompts_N == prompt], ratings[prompts_N == prompt]
        first, second = np.triu_indices(len(rated), 1)
        gap = rated[first] - rated[second]
        agreement = right((scores[first] - scores[second]) * np.sign(gap))[gap != 0]
        means.append(float(agreement.mean()) if len(agreement) else np.nan)
    return interval(np.array(means, dtype=np.float64))


def deciles(predicted: FloatArray, ratings: FloatArray) -> dict[str, Any]:
    """Mean prediction and mean rating of the rows in groups of like prediction, from the lowest to the highest."""
    groups = [group for group in np.array_split(np.argsort(predicted, kind="stable"), BINS) if len(group)]
    bins = [
        {"rows": len(g), "predicted": float(predicted[g].mean()), "rating": float(ratings[g].mean())} for g in groups
    ]
    error = sum(group["rows"] * abs(group["predicted"] - group["rating"]) for group in bins) / len(predicted)
    return {"bins": bins, "expected_error": float(error)}
