"""Paired comparison of two policies on the same prompts and seeds: win rate, difference, significance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raftune.arrays import FloatArray, IntArray
from raftune.evaluation.bootstrap import interval, mean_by_prompt
from raftune.records import derive_seed

FEWEST = 6  # prompts: with fewer, no assignment of signs reaches p = 0.05, so no 95 % interval is claimed either
EXACT = 14  # prompts up to which all 2^n assignments of signs are looked at
FLIPS = 9_999  # assignments generated at random beyond that: p is resolved to 1 / (FLIPS + 1)
BLOCK = 1_000_000
ROUNDING = 1e-5  # relative: what another batch may change in the score of the same completion, in float32


@dataclass(frozen=True, slots=True)
class PairedEstimate:
    """A mean over prompts and its 95 % interval; the ends are None with fewer than FEWEST prompts."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A against B. Shares and rates are means over prompts of the share among a prompt's pairs.

    wins, ties, losses: of A, in [0, 1], their sum is 1. win_rate: wins + ties/2. difference: of A's mean less B's, in
    units of the score; it and both means are None where only verdicts are known. p: two-sided, of the null that A and B
    are exchangeable; `flips` is the number of random assignments of signs behind it, None where all were looked at.
    """

    pairs: int
    prompts: int
    a: PairedEstimate | None
    b: PairedEstimate | None
    difference: PairedEstimate | None
    wins: float
    ties: float
    losses: float
    win_rate: PairedEstimate
    p: float
    flips: int | None


def paired(groups: IntArray, a: FloatArray, b: FloatArray, tie_within: float = 0.0) -> PairedTest | None:
    """A and B by their scores, (N,) each, pair by pair; groups[i] is the number of pair i's prompt.

    A pair in which either score is not finite is left out; None with nothing left.
    """
    both = np.isfinite(a) & np.isfinite(b)
    groups, a, b = groups[both], a[both], b[both]
    if not len(groups):
        return None
    return _test(groups, outcomes(a, b, tie_within), (a, b))


def judged(groups: IntArray, verdicts: FloatArray) -> PairedTest | None:
    """A and B by verdicts, (N,): 1 where A is better, 0 for a tie, -1 where B is better, NaN where there is none."""
    valid = np.isfinite(verdicts)
    return _test(groups[valid], verdicts[valid]) if valid.any() else None


def outcomes(a: FloatArray, b: FloatArray, tie_within: float = 0.0) -> FloatArray:
    """(N,) 1 where A's score is higher, -1 where B's is, 0 for a tie, NaN where either is not finite.

    A tie: the scores differ by no more than `tie_within` (units of the score) or than rounding.
    """
    difference = differences_of(a, b)
    return np.where(np.abs(difference) <= tie_within, 0.0, np.sign(difference))


def differences_of(a: FloatArray, b: FloatArray) -> FloatArray:
    """(N,) a - b, exactly 0 where rounding explains it: within 1e-5 of the larger score or of the median score."""
    size = np.maximum(np.abs(a), np.abs(b))
    finite = np.isfinite(size)
    usual = float(np.median(np.abs(np.concatenate((a[finite], b[finite]))))) if finite.any() else 0.0
    with np.errstate(invalid="ignore"):
        difference = np.where(finite, a - b, np.nan)
        return np.where(np.abs(difference) <= ROUNDING * np.maximum(size, usual), 0.0, difference)


def estimate(values: FloatArray, *, share: bool = False) -> PairedEstimate:
    """The mean of (P,) values, one a prompt, all finite, and its percentile-bootstrap interval over prompts.

    A bootstrap of equal values has no width, which shares in [0, 1] do not deserve: where all of P prompts show the
    share v, another prompt does otherwise with probability at most q = 1 - 0.025^(1/P) at this confidence, so the mean
    lies in [v(1-q), v(1-q) + q].
    """
    mean = float(values.mean())
    if len(values) < FEWEST:
        return PairedEstimate(mean, None, None)
    if share and np.ptp(values) == 0:
        unseen = 1 - 0.025 ** (1 / len(values))
        return PairedEstimate(mean, mean * (1 - unseen), mean * (1 - unseen) + unseen)
    bootstrapped = interval(values)
    assert bootstrapped is not None
    return PairedEstimate(mean, bootstrapped["low"], bootstrapped["high"])


def sign_flip(differences: FloatArray) -> tuple[float, int | None]:
    """The two-sided p of (P,) differences, one a prompt, and the number of random assignments behind it, None if exact.

    The share of assignments of signs whose mean is as far from 0 as the one seen (Fisher 1935; Pitman 1937). Valid at
    any number of prompts where the signs are exchangeable under the null. By random assignments it is
    (1 + reached)/(1 + FLIPS), which never claims more than an exact p would; the seed is fixed, so equal differences
    give an equal p. Differences of exactly 0 change nothing and are left out.
    """
    moved = differences[np.isfinite(differences) & (differences != 0)]
    if not len(moved):
        return 1.0, None
    slack = 1e-12 * np.abs(moved).sum()  # the same numbers, added in another order, differ in their last digits
    total = moved.sum()
    seen = abs(total) - slack
    if len(moved) <= EXACT:
        numbers = np.arange(2 ** len(moved))[:, None]
        signs = 1.0 - 2.0 * (numbers >> np.arange(len(moved)) & 1)
        return float(np.mean(np.abs(signs @ moved) >= seen)), None
    generator = np.random.Generator(np.random.Philox(derive_seed("sign flips", len(moved))))
    size, reached = max(1, BLOCK // len(moved)), 0
    for at in range(0, FLIPS, size):
        kept = generator.integers(0, 2, (min(size, FLIPS - at), len(moved)), dtype=np.int8)
        reached += int(np.sum(np.abs(2 * (kept.astype(np.float64) @ moved) - total) >= seen))
    return (1 + reached) / (1 + FLIPS), FLIPS


def _test(groups: IntArray, outcome: FloatArray, scores: tuple[FloatArray, FloatArray] | None = None) -> PairedTest:
    wins, ties, losses = (by_prompt(groups, np.asarray(outcome == value, np.float64)) for value in (1, 0, -1))
    differences = by_prompt(groups, outcome if scores is None else differences_of(*scores))
    p, flips = sign_flip(differences)
    a, b = (None, None) if scores is None else (estimate(by_prompt(groups, values)) for values in scores)
    return PairedTest(
        pairs=len(groups),
        prompts=len(wins),
        a=a,
        b=b,
        difference=None if scores is None else estimate(differences),
        wins=float(wins.mean()),
        ties=float(ties.mean()),
        losses=float(losses.mean()),
        win_rate=estimate(wins + ties / 2, share=True),
        p=p,
        flips=flips,
    )


def by_prompt(groups: IntArray, values: FloatArray) -> FloatArray:
    """(P,) the mean of each prompt that has a value, in the order of their numbers."""
    means = mean_by_prompt(groups, values)
    return means[np.isfinite(means)]
