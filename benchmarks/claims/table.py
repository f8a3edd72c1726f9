"""The claims, what the paper found, and the rule by which ours agrees, differs, or settles nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Result = Mapping[str, Any]  # numbers by their names in NAMES, and which prompts yield nothing
Results = Mapping[tuple[str, int], Result]  # by arm and seed

NAMES = {
    "reward": "reward",
    "judge": "judge",
    "kl": "KL",
    "distinct_2": "distinct-2",
    "msttr_100": "MSTTR-100",
    "length": "length",
    "empty": "empty",
    "initial_best": "initial best of K",
}
MEASURES = ("reward", "judge", "kl", "distinct_2", "msttr_100", "length")
DIGITS = {"kl": 2, "length": 1}
# The 97.5 % quantile of Student's t by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
RULE = (
    "For each seed a contrast is one number: a weighted sum of arms, which share prompts and evaluation seeds. It "
    "*agrees* with the paper (or, where the paper has no figure, the expectation *holds*) if it has the expected sign "
    "for every seed and the 95 % t-interval of its mean over the seeds excludes 0; it *differs* (*fails*) if the same "
    "is true of the other sign; otherwise it is *not resolved*."
)


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of arms that is expected above 0. `paper`: what the paper found; None where it has no figure."""

    words: str
    measure: str
    weights: Mapping[str, float]
    paper: str | None

    def values(self, results: Results, seeds: Sequence[int]) -> list[float]:
        """One number a seed."""
        return [sum(w * results[arm, s][self.measure] for arm, w in self.weights.items()) for s in seeds]


@dataclass(frozen=True)
class Claim:
    """One claim: its arms in the order in which they are shown, its contrasts, what its figure shows."""

    name: str
    title: str
    arms: tuple[str, ...]
    contrasts: tuple[Contrast, ...]
    shown: tuple[str, ...] = ("reward", "judge")
    extra: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    empty_arm: str = ""  # the arm whose empty prompts are shown
    note: str = ""


def minus(words: str, measure: str, more: str, less: str, paper: str | None) -> Contrast:
    return Contrast(words, measure, {more: 1.0, less: -1.0}, paper)


def slope(words: str, measure: str, at: Mapping[str, float], paper: str | None) -> Contrast:
    """The least-squares slope over arms that stand at these places."""
    middle = statistics.fmean(at.values())
    spread = sum((x - middle) ** 2 for x in at.values())
    return Contrast(words, measure, {arm: (x - middle) / spread for arm, x in at.items()}, paper)


KS = {f"k{2**i}": float(i) for i in range(6)}
CLAIMS = (
    Claim(
        "sft",
        "SFT against RAFT",
        ("start", "sft", "sft-raft", "k8"),
        (
            minus("SFT above the start", "reward", "sft", "start", "reward −.435 → .772"),
            minus("RAFT from the SFT model above SFT", "reward", "sft-raft", "sft", "reward .772 → 2.294"),
            minus("RAFT longer than SFT", "length", "sft-raft", "sft", "length 145.4 → 156.2"),
            minus("RAFT more diverse than SFT", "distinct_2", "sft-raft", "sft", "distinct-2 .250 → .258"),
            minus("RAFT more diverse than SFT", "msttr_100", "sft-raft", "sft", "MSTTR-100 .597 → .611"),
        ),
        labels={"k8": "RAFT alone"},
        note="Perplexity, which the paper also gives, needs reference completions and is left out. KL is to the "
        "starter. Good replies of this generator are alike, so whatever makes replies good makes them alike, too.",
    ),
    Claim(
        "k",
        "More candidates",
        ("k1", "k2", "k4", "k8", "k16", "k32"),
        (
            slope("reward per doubling of K", "reward", KS, "reward 2.180, 2.251, 2.329 at K = 8, 16, 32 (λ = .85)"),
            minus("K = 32 above K = 8", "reward", "k32", "k8", "reward 2.180 → 2.329 (λ = .85)"),
        ),
    ),
    Claim(
        "temperature",
        "Sampling temperature",
        ("t0.7", "t0.85", "k8"),
        (minus("λ = 0.7 above λ = 1", "reward", "t0.7", "k8", "reward 2.198 at .7, 2.180 at .85, 2.143 at 1.0"),),
        extra=("initial_best",),
        labels={"k8": "λ = 1"},
        note="Sampled at λ, evaluated at temperature 1 like every other arm.",
    ),
    Claim(
        "beta",
        "KL-regularised ranking",
        ("k8", "beta0.1", "beta0.3", "beta1"),
        (
            minus("β = 0 above β = 1 in reward", "reward", "k8", "beta1", "reward 2.143 at β = 0, 2.029 at .1"),
            minus("β = 0 above β = 1 in KL", "kl", "k8", "beta1", None),
        ),
        shown=("reward", "kl"),
        labels={"k8": "β = 0"},
        note="The reward's spread is larger here than in the paper, and so is β.",
    ),
    Claim(
        "ranking",
        "Local against global ranking",
        ("k8", "global"),
        (
            minus("global ranking leaves more prompts without a sample", "empty", "global", "k8", None),
            minus("local ranking ends higher by the judge", "judge", "k8", "global", None),
        ),
        shown=("judge", "empty"),
        extra=("empty",),
        labels={"k8": "local"},
        empty_arm="global",
        note="Local ranking keeps the best of 8 of each prompt; global the best eighth of all. Empty: the "
        "share of a round's prompts that yield nothing.",
    ),
    Claim(
        "teacher",
        "A teacher's samples for a smaller student",
        ("student", "student-own", "student-taught"),
        (
            minus("own samples lift the student", "reward", "student-own", "student", "reward −1.23 → .210"),
            minus("a teacher's lift it further", "reward", "student-taught", "student-own", "reward .210 → .739"),
        ),
        labels={"student": "the student"},
        note="Eight candidates a prompt: all its own, or one of its own and seven of the aligned arm K = 8. KL is to "
        "the student's start. Look at variety beside the reward: by its own samples the student comes down to a few "
        "short replies (distinct-2, MSTTR-100, length), while a teacher's are longer than 182,000 parameters learn to "
        "say in six rounds of eight steps. Where the paper's student had room to imitate, this one has not.",
    ),
    Claim(
        "noise",
        "Noise in the reward",
        ("k8", "noise0.5", "noise1", "noise2", "random"),
        (
            minus("no noise above noise of 2 sd", "reward", "k8", "noise2", None),
            minus("noise of 2 sd above chance", "reward", "noise2", "random", None),
        ),
        labels={"k8": "no noise"},
        note="Gaussian noise is added to the reward that selects, in standard deviations of that reward over the "
        "start's completions; evaluated without it.",
    ),
    Claim(
        "random",
        "Does selection help at all?",
        ("start", "random", "k8"),
        (
            minus("best of 8 above one of 8 by chance", "reward", "k8", "random", None),
            minus("the same, by the judge", "judge", "k8", "random", None),
        ),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """A contrast's mean, its interval (None with one seed), each seed's value, and the word."""

    mean: float
    half: float | None
    values: list[float]
    word: str


def verdict(contrast: Contrast, values: list[float]) -> Verdict:
    mean = statistics.fmean(values)
    good, bad = ("agrees", "differs") if contrast.paper else ("holds", "fails")
    if len(values) < 2:
        return Verdict(mean, None, values, "not resolved: one seed")
    half = T.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    if abs(mean) > half and all(v > 0 for v in values):
        return Verdict(mean, half, values, good)
    if abs(mean) > half and all(v < 0 for v in values):
        return Verdict(mean, half, values, bad)
    lean = (
        "every seed leans as expected"
        if all(v > 0 for v in values)
        else "every seed leans the other way"
        if all(v < 0 for v in values)
        else "seeds of both signs"
    )
    return Verdict(mean, half, values, f"not resolved: {lean}")
