"""Metrics on held-out pairs: accuracy, calibration and length bias."""

from __future__ import annotations

from typing import Any

import numpy as np

from raftune.arrays import BoolArray, FloatArray, IntArray
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt

CONFIDENCES = 10  # bins of equal width in [0.5, 1]
# By how much the preferred answer is longer, as a share of the longer one of the two: (name, from, to).
LENGTHS = (
    ("much shorter", -1.01, -0.5),
    ("shorter", -0.5, -0.1),
    ("alike", -0.1, 0.1),
    ("longer", 0.1, 0.5),
    ("much longer", 0.5, 1.01),
)
ONE_SIDED = 0.9  # a model that prefers the longer (or the shorter) answer so often may be measuring nothing else


def pairwise_report(scores_N2: FloatArray, lengths_N2: FloatArray, prompts_N: IntArray) -> dict[str, Any]:
    """Everything that is told of N held-out pairs, with intervals by the bootstrap over prompts.

    scores_N2, lengths_N2: of the preferred answer and of the other; lengths in tokens.
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
    """1 where the preferred answer scores higher, 0 where lower, ½ at a tie."""
    return np.asarray((np.sign(margins) + 1) / 2, dtype=np.float64)


def calibration(margins: FloatArray) -> dict[str, Any]:
    """How often the model is right when it is sure to this degree.

    Its confidence in a pair is sigmoid(|margin|), in [½, 1]: what Bradley-Terry says the answer that it prefers is
    preferred with. The expected calibration error is the mean of |accuracy - confidence| over bins, by pairs.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1.0, CONFIDENCES + 1)
    at = np.clip(np.digitize(confidence, edges) - 1, 0, CONFIDENCES - 1)
    bins = [bin_of(edges[i], edges[i + 1], confidence[at == i], right(margins)[at == i]) for i in range(CONFIDENCES)]
    error = sum(one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins if one["pairs"]) / len(margins)
    return {
        "bins": bins,
        "expected_error": float(error),
        "confidence": float(confidence.mean()),
        "accuracy": float(right(margins).mean()),
    }


def bin_of(low: float, high: float, confidence: FloatArray, correct: FloatArray) -> dict[str, Any]:
    some = len(confidence) > 0
    return {
        "from": round(float(low), 2),
        "to": round(float(high), 2),
        "pairs": len(confidence),
        "confidence": float(confidence.mean()) if some else None,
        "accuracy": float(correct.mean()) if some else None,
    }


def length_report(margins: FloatArray, lengths_N2: FloatArray, prompts_N: IntArray) -> dict[str, Any]:
    """Accuracy by how much longer the preferred answer is, beside the rule that the longer answer wins.

    `only_length` is True where that rule (or its reverse) does as well within the interval, and the model nearly always
    agrees with it: it knows nothing then that a ruler does not.
    """
    longer = lengths_N2[:, 0] - lengths_N2[:, 1]
    share = longer / np.maximum(lengths_N2.max(axis=1), 1)
    rule = right(longer)
    agrees = right(margins * np.sign(longer))
    agreement, reverse = float(agrees.mean()), float(agrees.mean()) < 0.5
    gain = by_prompt(right(margins) - (1 - rule if reverse else rule), prompts_N)
    one_sided = max(agreement, 1 - agreement) >= ONE_SIDED
    return {
        "bins": [length_bin(name, (share >= low) & (share < high), margins, prompts_N) for name, low, high in LENGTHS],
        "longer_wins": by_prompt(rule, prompts_N),
        "prefers_longer": agreement,
        "gain_over_length": gain,
        "only_length": bool(one_sided and gain is not None and (gain["low"] is None or gain["low"] <= 0)),
    }


def length_bin(name: str, inside: BoolArray, margins: FloatArray, prompts_N: IntArray) -> dict[str, Any]:
    return {
        "preferred": name,
        "pairs": int(inside.sum()),
        "accuracy": by_prompt(right(margins[inside]), prompts_N[inside]) if inside.any() else None,
    }


def by_prompt(values: FloatArray, prompts_N: IntArray) -> Interval | None:
    """The interval of the mean over prompts of what each prompt's rows are on the mean."""
    return interval(mean_by_prompt(prompts_N, values))
