"""Combines the parts of a score by weights or ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from raftune.arrays import FloatArray, IntArray
from raftune.records import RewardPart, Score, ScoreStatus

Bounds = tuple[float | None, float | None]  # at least, at most
Combine = Literal["sum", "rank"]
# The status of a sample whose parts failed in different ways is the first of these that any part has.
PRECEDENCE = (ScoreStatus.ERROR, ScoreStatus.TIMEOUT, ScoreStatus.INVALID)


@dataclass(frozen=True, slots=True)
class RewardShare:
    """What one reward counts in the score: its weight times its value, or its weight where a threshold is kept.

    With both thresholds the value must lie between them, both included.
    """

    weight: float = 1.0
    at_least: float | None = None
    at_most: float | None = None

    @property
    def has_threshold(self) -> bool:
        return self.at_least is not None or self.at_most is not None

    def worth(self, value: float) -> float:
        """The value itself; with a threshold 1 where it is kept, 0 where not."""
        if not self.has_threshold:
            return value
        low, high = self.at_least, self.at_most
        return float((low is None or value >= low) and (high is None or value <= high))


def combined(
    parts: Sequence[Mapping[str, RewardPart]], shares: Mapping[str, RewardShare], how: Combine, groups: Sequence[Any]
) -> list[Score]:
    """One score a sample, of its parts by reward; groups[i] names the prompt that sample i answers.

    `sum`: what the parts that apply count, added up. `rank`: the same, with a part's rank among the samples of its
    prompt, 0 (lowest value) to 1, in place of its value; equal values share the mean of their ranks, one alone has 0.5,
    and a reward with a threshold still counts all or nothing. A sample with a failed part has no score and no rank.
    """
    failures = []
    worths: list[dict[str, float]] = []
    for row in parts:
        statuses = {part.status for part in row.values()}
        failures.append(next((status for status in PRECEDENCE if status in statuses), None))
        values = {} if failures[-1] else row
        worths.append({name: shares[name].worth(p.value) for name, p in values.items() if p.value is not None})
    if how == "rank":
        numbers = numbered(groups)
        for name in (name for name, share in shares.items() if not share.has_threshold):
            rows = [i for i, worth in enumerate(worths) if name in worth]
            by_row = ranks(np.array([worths[i][name] for i in rows], np.float64), numbers[rows])
            for i, rank in zip(rows, by_row.tolist(), strict=True):
                worths[i][name] = rank
    scores = []
    for row, worth, failure in zip(parts, worths, failures, strict=True):
        counts = [share.weight * worth[name] for name, share in shares.items() if name in worth]
        total = sum(counts)
        status = failure or (ScoreStatus.OK if counts else ScoreStatus.NOT_APPLICABLE)
        if status is ScoreStatus.OK and not math.isfinite(total):
            status = ScoreStatus.INVALID
        scores.append(Score(total if status is ScoreStatus.OK else None, status, row))
    return scores


def numbered(groups: Sequence[Any]) -> IntArray:
    """For each sample the number of its group, in the order in which they first come."""
    seen: dict[Any, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], np.int64)


def ranks(values: FloatArray, groups: IntArray) -> FloatArray:
    """(N,) the rank of each value in its group, 0 (lowest) to 1; equal ones share their mean; 0.5 for one alone."""
    result = np.full(len(values), 0.5)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    for rows in np.split(order, starts[1:]):
        if len(rows) > 1:
            inside = np.sort(values[rows])
            first, behind = (np.searchsorted(inside, values[rows], side) for side in ("left", "right"))
            result[rows] = (first + behind - 1) / 2 / (len(rows) - 1)
    return result


def with_counts(samples: pa.Table, shares: Mapping[str, RewardShare], how: Combine) -> pa.Table:
    """The samples (prompt_id, score, rewards/NAME) with counts/NAME where not the value counts but something else.

    What counts is unweighted; null where a sample has no score.
    """
    scored = samples.column("score").is_valid().to_numpy(zero_copy_only=False)
    numbers = numbered(samples.column("prompt_id").to_pylist())
    for name, share in shares.items():
        if how == "sum" and not share.has_threshold:
            continue
        values = samples.column(f"rewards/{name}").to_numpy(zero_copy_only=False).astype(np.float64)
        rows = np.flatnonzero(scored & np.isfinite(values))
        worths = np.array([share.worth(value) for value in values[rows].tolist()], np.float64)
        counts = np.full(len(values), np.nan)
        counts[rows] = worths if share.has_threshold else ranks(worths, numbers[rows])
        samples = samples.append_column(f"counts/{name}", pa.array(counts, from_pandas=True))
    return samples
