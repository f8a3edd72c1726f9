"""Selection: scores in, verdicts out. Independent of row order and number of workers.

Every candidate passes three gates. *Screen*: it must be valid, have a finite score and a length inside the window and,
where duplicates are dropped, not repeat a completion of its prompt with a lower index. Those that pass compete, and are
ranked within their prompt by score, ties by index. *Skip*: a prompt whose competitors all score the same is left out,
unless the configuration says otherwise; so is one whose best is within `margin` of their mean. *Rule*: of what is then
in play, the configured rule keeps some, with a weight.

Letters: N candidates, C of them in play, G prompts in play.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from raftune.arrays import BoolArray, ByteArray, FloatArray, IntArray, UInt64Array
from raftune.config.extensions import code_hash, load_extension, register
from raftune.config.selection import (
    BestOfK,
    CustomRule,
    Random,
    SelectionConfig,
    Softmax,
    Threshold,
    TopFraction,
    TopM,
)
from raftune.errors import ConfigError, ExtensionError
from raftune.protocols import Decision, RankedCandidates, Rule


class Reason(IntEnum):
    """Why a candidate has its weight. The value is the index into REASONS; `words` are stored with the verdict."""

    words: str

    def __new__(cls, words: str) -> Self:
        member = int.__new__(cls, len(cls.__members__))
        member._value_ = len(cls.__members__)
        member.words = words
        return member

    BEST = "best of its prompt"
    AMONG_BEST = "among the best of its prompt"
    IN_FRACTION = "inside the kept fraction"
    REACHES_THRESHOLD = "reaches the threshold"
    WEIGHTED = "weighted by its score"
    CHANCE = "kept by chance (control)"
    ONLY_ONE = "the only candidate of its prompt"
    KEPT_EQUAL = "kept with nothing to rank: all candidates score the same"
    BEATEN = "a better one was kept"
    TIED = "tied with a better index"
    OUTSIDE_FRACTION = "outside the kept fraction"
    UNLUCKY_TIE = "tied at the cut of the kept fraction, not chosen"
    BELOW_THRESHOLD = "below the threshold"
    OVER_CAP = "beyond max_per_prompt of its prompt"
    NO_WEIGHT = "weight too small to represent"
    NOT_DRAWN = "not chosen by the random control"
    NO_SCORE = "no usable score"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    DUPLICATE = "duplicate of a lower index"
    ALL_EQUAL = "nothing to rank: all candidates score the same"
    LEFT_ALONE = "nothing to rank: no other candidate of its prompt competes"
    SMALL_MARGIN = "prompt skipped: margin too small"
    INVALID = "invalid sample"


REASONS: tuple[str, ...] = tuple(reason.words for reason in Reason)
_RANKED = (Reason.BEST, Reason.AMONG_BEST, Reason.WEIGHTED)  # of a candidate that others were ranked against
_SKIPPED = (Reason.ALL_EQUAL, Reason.LEFT_ALONE, Reason.SMALL_MARGIN)
_STANDING = 255  # not a reason: marks candidates that no gate has rejected so far


@dataclass(frozen=True)
class Candidates:
    """N samples as columns. No two rows have the same (group, k).

    group: prompt index. k: index within the prompt. score: NaN or infinite where there is no usable one. length: in the
    family's unit. content: a hash of the completion, equal where completions are identical. invalid: True where the
    policy says that the sample cannot be trained on; None where it never does.
    """

    group: IntArray
    k: npt.NDArray[np.int32]
    score: FloatArray
    length: IntArray
    content: UInt64Array
    invalid: BoolArray | None = None

    def __post_init__(self) -> None:
        columns = (self.group, self.k, self.score, self.length, self.content)
        assert all(column.shape == (len(self.group),) for column in columns), "columns differ in length"


@dataclass(frozen=True)
class Verdicts:
    """N decisions, row for row. rank: 1 is the best competitor of its prompt, 0 did not compete. weight: 0 is not kept.
    reason: an index into `words`, which are REASONS and, after them, those of a custom rule.
    """

    rank: npt.NDArray[np.int32]
    weight: FloatArray
    reason: ByteArray
    words: tuple[str, ...] = REASONS


def select(candidates: Candidates, config: SelectionConfig, seed: int, rule: Rule | None = None) -> Verdicts:
    """A verdict for every candidate: which are kept, with what weight, and why. Independent of the order of rows.

    `seed` decides ties at the cut of top_fraction and the samples of random, and nothing else. `rule` is the configured
    one, loaded where it is not given. Takes O(N log N) time and about 100 bytes a candidate.
    """
    rule = rule or load_rule(config)
    reason = np.full(len(candidates.group), _STANDING, np.uint8)
    if config.max_length is not None:
        reason[candidates.length > config.max_length] = Reason.TOO_LONG
    if config.min_length is not None:
        reason[candidates.length < config.min_length] = Reason.TOO_SHORT
    reason[~np.isfinite(candidates.score)] = Reason.NO_SCORE
    if candidates.invalid is not None:
        reason[candidates.invalid] = Reason.INVALID
    if config.drop_duplicates:
        rows = np.flatnonzero(reason == _STANDING)
        group, content = candidates.group[rows], candidates.content[rows]
        order = np.lexsort((candidates.k[rows], content, group))
        same = (np.diff(group[order]) == 0) & (content[order][1:] == content[order][:-1])
        reason[rows[order[1:][same]]] = Reason.DUPLICATE
    competing = _pool(candidates, np.flatnonzero(reason == _STANDING))
    several = np.bincount(candidates.group, minlength=1)[candidates.group[competing.row[competing.start]]] > 1
    rank = np.zeros(len(reason), np.int32)
    rank[competing.row] = competing.rank
    weight = np.zeros(len(reason))
    skip = _skips(competing, several, config)
    reason[competing.row] = np.repeat(skip, competing.size)
    playing = competing.only(skip == _STANDING)
    if len(playing.row):
        weight[playing.row], reason[playing.row] = _decide_by(rule, config.rule, playing, seed)
    assert not (reason == _STANDING).any(), "a candidate left without a reason"
    unranked = np.repeat(competing.equal, competing.size) & (weight[competing.row] > 0)
    unranked &= np.isin(reason[competing.row], _RANKED)
    alone = ~np.repeat(several, competing.size)
    reason[competing.row[unranked]] = np.where(alone, Reason.ONLY_ONE, Reason.KEPT_EQUAL)[unranked]
    return Verdicts(rank, weight, reason, REASONS if isinstance(rule, BuiltInRule) else (*REASONS, *rule.reasons))


def nothing_to_rank(candidates: Candidates, verdicts: Verdicts) -> dict[int, float]:
    """The prompts of several candidates whose competitors all score the same, ascending, each with that score."""
    competing = _pool(candidates, np.flatnonzero(verdicts.rank > 0))
    first = competing.row[competing.start]
    group = candidates.group[first]
    several = np.bincount(candidates.group, minlength=1)[group] > 1
    tied = competing.equal & several
    return dict(zip(group[tied].tolist(), candidates.score[first][tied].tolist(), strict=True))


def without_candidates(candidates: Candidates, verdicts: Verdicts) -> dict[int, str]:
    """The prompts of which nothing was kept, ascending, each with its reasons in words."""
    kept = np.unique(candidates.group[verdicts.weight > 0])
    rows = np.flatnonzero(~np.isin(candidates.group, kept))
    rows = rows[np.argsort(candidates.group[rows], kind="stable")]
    groups, starts = np.unique(candidates.group[rows], return_index=True)
    reasons = np.split(verdicts.reason[rows], starts[1:])
    tied, words = nothing_to_rank(candidates, verdicts), {}
    for group, codes in zip(groups.tolist(), reasons, strict=False):
        counts = Counter(codes.tolist())
        skipped = [reason for reason in _SKIPPED if reason in counts]
        if skipped or len(counts) == 1:
            reason = (skipped or list(counts))[0]
            words[group] = verdicts.words[reason]
            if reason == Reason.ALL_EQUAL and group in tied:
                words[group] = f"nothing to rank: all candidates score {tied[group]:.6g}"
        else:
            by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            parts = (f"{verdicts.words[reason]} ({count} of {counts.total()})" for reason, count in by_count)
            words[group] = ", ".join(parts)
    return words


def _positions(size: IntArray) -> npt.NDArray[np.int32]:
    """(C,) 1, 2, 3, … inside each consecutive run of these sizes."""
    return (np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + 1).astype(np.int32)


def _pool(candidates: Candidates, rows: IntArray) -> RankedCandidates:
    """The candidates at `rows`, ranked inside their groups: higher scores first, ties to the lower k."""
    row = rows[np.lexsort((candidates.k[rows], -candidates.score[rows], candidates.group[rows]))]
    group, k, score = candidates.group[row], candidates.k[row], candidates.score[row]
    twins = (np.diff(group) == 0) & (np.diff(k) == 0)
    assert not twins.any(), "two candidates of one group have the same k"
    size = np.unique(group, return_counts=True)[1]
    return RankedCandidates(row, group, k, score, _positions(size), np.cumsum(size) - size, size)


def _skips(pool: RankedCandidates, several: BoolArray, config: SelectionConfig) -> ByteArray:
    """(G,) the reason for which a prompt is skipped, or _STANDING. A single competitor counts as all equal.

    `several` (G,): whether the prompt has more than one candidate. A prompt with one is kept by `auto`.
    """
    skip = np.full(len(pool.start), _STANDING, np.uint8)
    if not len(skip):
        return skip
    if config.margin > 0:
        best = pool.score[pool.start]
        with np.errstate(over="ignore"):  # scores of opposite sign near the largest float: infinitely far apart
            below_best = np.repeat(best, pool.size) - pool.score
            skip[np.add.reduceat(below_best, pool.start) / pool.size < config.margin] = Reason.SMALL_MARGIN
    if config.skips_equal:
        equal = pool.equal & (several | (config.all_equal == "skip"))
        skip[equal] = np.where(pool.size > 1, Reason.ALL_EQUAL, Reason.LEFT_ALONE)[equal]
    return skip


# -- the rules: (what is in play, options, seed) → weight (C,), reason (C,) ------------------------------------------

RULES: dict[str, Callable[[RankedCandidates, Any, int], Decision]] = {}  # the built-in rules, by selection.rule
MOST_REASONS = 64  # of a custom rule; a verdict's reason takes a byte on disk


@dataclass(frozen=True)
class BuiltInRule:
    """A built-in rule with its options."""

    function: Callable[[RankedCandidates, Any, int], Decision]
    options: SelectionConfig
    reasons: tuple[str, ...] = REASONS

    def decide(self, pool: RankedCandidates, seed: int) -> Decision:
        return self.function(pool, self.options, seed)


def load_rule(config: SelectionConfig) -> Rule:
    """The configured rule. Raises ConfigError where a custom one is missing or incomplete."""
    if not isinstance(config, CustomRule):
        return BuiltInRule(RULES[config.rule], config)
    rule: Rule = load_extension(
        config.rule,
        "selection.rule",
        config.options,
        "selection.options",
        methods={"decide": ("pool", "seed")},
        attributes=("reasons",),
    )
    texts = isinstance(rule.reasons, list | tuple) and all(isinstance(reason, str) for reason in rule.reasons)
    if not texts or not 1 <= len(rule.reasons) <= MOST_REASONS:
        raise ConfigError(
            f"selection.rule: `reasons` of {config.rule} must be 1 to {MOST_REASONS} texts; got {rule.reasons!r:.80}. "
            "They say why a candidate was kept or not."
        )
    return rule


def rule_code(config: SelectionConfig) -> dict[str, str]:
    """The hash of the file of a custom rule, which enters the key of the selection."""
    return {"selection rule's classes": code_hash(config.rule)} if isinstance(config, CustomRule) else {}


def _decide_by(rule: Rule, name: str, pool: RankedCandidates, seed: int) -> Decision:
    """What the rule decides. Raises ExtensionError where a custom one fails or breaks its contract."""
    if isinstance(rule, BuiltInRule):
        return rule.decide(pool, seed)
    try:
        weight, reason = rule.decide(pool, seed)
        weight, reason = np.asarray(weight, np.float64), np.asarray(reason)
    except Exception as error:
        raise ExtensionError(
            f"selection.rule: {name} raised {type(error).__name__}: {error}. Fix it and run `raftune resume RUN`."
        ) from error
    shape = pool.row.shape
    wrong = ""
    if weight.shape != shape or reason.shape != shape:
        wrong = f"(weight, reason), two arrays of {shape[0]}; got shapes {weight.shape} and {reason.shape}"
    elif not (np.isfinite(weight) & (weight >= 0)).all():
        bad = weight[~(np.isfinite(weight) & (weight >= 0))][0]
        wrong = f"weights that are finite and not negative; got {bad}"
    elif not np.issubdtype(reason.dtype, np.integer) or ((reason < 0) | (reason >= len(rule.reasons))).any():
        wrong = f"reasons as indices into its {len(rule.reasons)} `reasons`; got {reason[:3].tolist()}"
    if wrong:
        raise ExtensionError(f"selection.rule: `decide` of {name} must return {wrong}. Fix it and resume the run.")
    return weight, (reason + len(REASONS)).astype(np.uint8)


@register(RULES, "best_of_k")
@register(RULES, "top_m")
def _top_m(pool: RankedCandidates, options: BestOfK | TopM, seed: int) -> Decision:
    """The m first of each prompt's ranking; all of a prompt that has fewer."""
    m = options.m if isinstance(options, TopM) else 1
    kept = pool.rank <= m
    last_kept = pool.score[pool.start + np.minimum(m, pool.size) - 1]
    lost = np.where(pool.score == np.repeat(last_kept, pool.size), Reason.TIED, Reason.BEATEN)
    return _decide(kept, np.where(pool.rank == 1, Reason.BEST, Reason.AMONG_BEST), lost)


@register(RULES, "top_fraction")
def _top_fraction(pool: RankedCandidates, options: TopFraction, seed: int) -> Decision:
    """The best n = max(1, floor(C · keep_fraction)) of all prompts together, at most max_per_prompt of each.

    The cap comes first, so that what it frees goes to other prompts. Among the scores equal to the n-th, the seed
    decides how many each prompt keeps, with equal chances; these are its lowest indices.
    """
    # 0.29 * 100 is 28.999…96 in floats, and the user means 29.
    n = max(1, int(np.floor(len(pool.row) * options.keep_fraction + 1e-9)))
    allowed = pool.rank <= (options.max_per_prompt or len(pool.rank))
    n = min(n, int(allowed.sum()))
    cut = -np.partition(-pool.score[allowed], n - 1)[n - 1]
    kept = allowed & (pool.score > cut)
    at_cut = np.flatnonzero(allowed & (pool.score == cut))
    group, k = pool.group[at_cut], pool.k[at_cut]
    sampled = np.lexsort((k, group, _noise(seed, group, k)))[: n - int(kept.sum())]
    groups, number = np.unique(group, return_inverse=True)
    share = np.bincount(number[sampled], minlength=len(groups))
    # A pool is sorted by group, and by k where scores are equal: positions in a run follow k.
    kept[at_cut[_positions(np.bincount(number)) <= share[number]]] = True
    lost = np.where(pool.score == cut, Reason.UNLUCKY_TIE, Reason.OUTSIDE_FRACTION)
    over_cap = ~allowed & (pool.score >= cut)
    return _decide(kept, np.full(len(kept), Reason.IN_FRACTION), np.where(over_cap, Reason.OVER_CAP, lost))


@register(RULES, "threshold")
def _threshold(pool: RankedCandidates, options: Threshold, seed: int) -> Decision:
    """Every score that reaches the threshold; of each prompt at most its max_per_prompt best."""
    reaches, allowed = pool.score >= options.threshold, pool.rank <= (options.max_per_prompt or len(pool.rank))
    lost = np.where(reaches, Reason.OVER_CAP, Reason.BELOW_THRESHOLD)
    return _decide(reaches & allowed, np.full(len(reaches), Reason.REACHES_THRESHOLD), lost)


@register(RULES, "softmax")
def _softmax(pool: RankedCandidates, options: Softmax, seed: int) -> Decision:
    """All, with weights softmax(score / temperature) that sum to 1 for each prompt."""
    with np.errstate(over="ignore", under="ignore"):  # a gap of more than about 700 temperatures has weight 0
        raw = np.exp((pool.score - np.repeat(pool.score[pool.start], pool.size)) / options.temperature)
        weight = raw / np.repeat(np.add.reduceat(raw, pool.start), pool.size)
    return weight, np.where(weight > 0, Reason.WEIGHTED, Reason.NO_WEIGHT).astype(np.uint8)


@register(RULES, "random")
def _random(pool: RankedCandidates, options: Random, seed: int) -> Decision:
    """m of each prompt by chance, whatever their scores: the control that a rule must beat on the same candidates."""
    order = np.lexsort((pool.k, _noise(seed, pool.group, pool.k), pool.group))
    kept = np.zeros(len(order), np.bool_)
    kept[order[_positions(pool.size) <= options.m]] = True
    return _decide(kept, np.full(len(kept), Reason.CHANCE), np.full(len(kept), Reason.NOT_DRAWN))


def _decide(kept: BoolArray, won: npt.NDArray[np.int_], lost: npt.NDArray[np.int_]) -> Decision:
    return kept.astype(np.float64), np.where(kept, won, lost).astype(np.uint8)


def _noise(seed: int, group: IntArray, k: npt.NDArray[np.int32]) -> UInt64Array:
    """(C,) 64 uniform bits that depend on (seed, group, k) alone."""
    state = np.full(len(group), seed % 2**64, np.uint64)
    for key in (group.astype(np.uint64), k.astype(np.uint64)):
        state = _mix(_mix(state) ^ key)
    return state


def _mix(state: UInt64Array) -> UInt64Array:
    """A step of SplitMix64 (Steele, Lea, Flood 2014): a bijection."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
