"""Alarms of a round, one function each. An alarm has a message, numbers and samples.

An alarm reports measurements, not causes. A function returns None if there is no alarm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.config.guards import AlarmName, GuardsConfig
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt
from raftune.evaluation.columns import prompt_numbers
from raftune.evaluation.diversity import near_duplicates as duplicates
from raftune.evaluation.diversity import numbered, shingle_sets
from raftune.evaluation.paired import sign_flip
from raftune.results.measures import spread
from raftune.results.summary import ends_of
from raftune.sanitize import percent as share

Measures = Mapping[str, Any]

SHOWN = 8  # samples that an alarm names, each of another prompt
FEWEST = 16  # kept samples below which rules that look at a set of them are silent
SIZES = 1.5  # factor between the words of two sets up to which their shares of distinct pairs are compared
LIKED = 0.75  # quantile of the trained score from which on a held-out sample counts as one that the reward likes
ONE_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm: a message, numbers, and samples as (sample id, reason)."""

    alarm: AlarmName
    title: str
    evidence: str
    numbers: Mapping[str, Any]
    samples: Sequence[tuple[str, str]]

    def as_json(self, round_: int) -> dict[str, Any]:
        named = [{"sample_id": name, "why": why} for name, why in self.samples]
        facts = {"title": self.title, "evidence": self.evidence, "numbers": dict(self.numbers)}
        return {"alarm": self.alarm, "round": round_, **facts, "samples": named}


# -- the held-out reward ----------------------------------------------------------------------------------------------


def held_out_falls(now: pa.Table, earlier: Sequence[pa.Table | None], judge: str, false_alarms: float) -> Alarm | None:
    """Raised where, since the earlier round of the highest held-out reward, the held-out one fell and the trained rose.

    Both by paired differences: the same prompts with the same seeds. With t earlier rounds to choose from, the fall
    must be less likely by chance than false_alarms / t, so that false_alarms bounds the chance in every round
    (Bonferroni) that a policy whose held-out reward does not change raises this. Tables have prompt_id, k, score,
    held_out. Names the SHOWN answers with the lowest held-out scores among the quarter with the highest trained ones.
    """
    since = int(np.argmax([mean_of_prompts(table, "held_out") for table in earlier]))
    then = earlier[since]
    assert then is not None, "there is an earlier round with held-out samples"
    trained, held_out = (differences(now, then, name) for name in ("score", "held_out"))
    if not len(trained) or not len(held_out) or trained.mean() <= 0 or held_out.mean() >= 0:
        return None
    chance = by_chance(held_out) * len(earlier)
    if max(chance, by_chance(trained)) > false_alarms:
        return None
    rose, fell = known(interval(trained)), known(interval(-held_out))
    start = f"round {since}" if since else "the start"
    return Alarm(
        "held_out_falls",
        "The held-out reward falls while the trained one rises",
        f"since {start}, on the same {rose['n']} held-out prompts and seeds, the trained reward rose by {ranged(rose)} "
        f"and {judge} fell by {ranged(fell)}; by chance in {odds(chance)}",
        {"since": since, "trained": rose, "held_out": interval(held_out), "chance": chance},
        [*liked_but_bad(now, then, judge, start)],
    )


def liked_but_bad(now: pa.Table, then: pa.Table, judge: str, start: str) -> Iterator[tuple[str, str]]:
    """Of the held-out answers with the highest trained scores those with the lowest held-out ones, a prompt each."""
    trained, held_out = column(now, "score"), column(now, "held_out")
    both = np.isfinite(trained) & np.isfinite(held_out)
    liked = np.flatnonzero(both & (trained >= np.quantile(trained[both], LIKED)))
    order = liked[np.lexsort((liked, -trained[liked], held_out[liked]))]
    before = dict(zip(keys(then), zip(column(then, "score"), column(then, "held_out"), strict=True), strict=True))
    places = keys(now)
    for row in one_a_prompt(now, order):
        old = before.get(places[row], (math.nan, math.nan))
        was = f"; at {start}, same seed: {old[0]:.3g} and {old[1]:.3g}" if np.isfinite(old).all() else ""
        yield name_of(now, row), f"trained reward {trained[row]:.3g}, {judge} {held_out[row]:.3g}{was}"


def differences(now: pa.Table, then: pa.Table, name: str) -> FloatArray:
    """(P,) by how much the mean over a prompt's samples rose, for each prompt that both tables have a value for."""
    ids = pc.unique(now.column("prompt_id"))
    means = []
    for table in (now, then):
        groups = pc.index_in(table.column("prompt_id"), value_set=ids)
        inside = table.filter(groups.is_valid())
        numbers = np.asarray(groups.drop_null().to_numpy(), np.int64)
        found = mean_by_prompt(numbers, column(inside, name))
        means.append(np.concatenate([found, np.full(len(ids) - len(found), np.nan)]))
    rise = means[0] - means[1]
    return np.asarray(rise[np.isfinite(rise)])


def by_chance(moved: FloatArray) -> float:
    """At most the probability that differences of these sizes, their signs tossed, have a sum as far from 0.

    By the sign test that `compare` uses, whose random assignments resolve 1 in 10,000; beyond that by Hoeffding's bound
    2 exp(-z²/2), z² = (Σ d)²/Σ d² (1963), so that a level shared among many rounds can be reached.
    """
    squares = float(np.sum(moved**2))
    bound = 2 * math.exp(-(float(moved.sum()) ** 2) / (2 * squares)) if squares > 0 else 1.0
    return min(sign_flip(moved)[0], bound)


# -- what was kept ----------------------------------------------------------------------------------------------------


def diversity_drops(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, drop: float) -> Alarm | None:
    """Raised where the kept answers' distinct-2 has lost this share, against the samples of this round or of round 1.

    Each is measured on as many answers as were kept; that of round 1 is left out where the sizes are too unlike. Names
    the kept answers whose word pairs are the most common among all that were kept.
    """
    selected, drawn = sets["selected"], sets["generated"]
    if kept.num_rows < FEWEST or "distinct_2" not in selected:
        return None
    here = selected["distinct_2"]
    others = {"this round": drawn.get("distinct_2")}
    if 1 / SIZES <= selected["words"] / max(first.get("words", 0), 1) <= SIZES:
        others["round 1"] = first.get("distinct_2")
    lost = {name: 1 - here / value for name, value in others.items() if value}
    if max(lost.values(), default=0.0) <= drop:
        return None
    against = ", ".join(f"in as many generated in {name} {share(others[name] or 0.0)}" for name in lost)
    found = {
        "selected": here,
        "generated": others["this round"],
        "first": others.get("round 1"),
        "lost": max(lost.values()),
    }
    return Alarm(
        "diversity_drops",
        "What was kept is less varied than what was generated",
        f"of the word pairs in the {kept.num_rows} kept answers {share(here)} are different; {against}",
        found,
        [*most_common(kept)],
    )


def most_common(kept: pa.Table) -> Iterator[tuple[str, str]]:
    """The kept answers whose word pairs occur in the most other kept answers, a prompt each."""
    pairs = shingle_sets(numbered(texts_of(kept)))
    counts = np.bincount(np.concatenate(pairs))
    common = np.array([counts[own].mean() for own in pairs])
    for row in one_a_prompt(kept, np.argsort(-common, kind="stable")):
        yield name_of(kept, row), f"its word pairs occur in {common[row]:.0f} of {len(pairs)} kept answers, on average"


def length_drifts(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, factor: float) -> Alarm | None:
    """Raised where the kept answers are so many times as long, or as short, as the samples of this round or of round 1.

    By the whole 95 % interval over prompts. Names the longest kept answers, or the shortest.
    """
    lengths = column(kept, "length")
    found = interval(mean_by_prompt(prompt_numbers(kept), lengths))
    others = {"this round": sets["generated"].get("length"), "round 1": first.get("length")}
    means = {name: value for name, value in others.items() if value}
    if kept.num_rows < FEWEST or found is None or not means:
        return None
    low, high = min(means.values()), max(means.values())
    ends = ends_of(found)
    longer = ends is not None and ends[0] > factor * low
    if ends is None or (not longer and not ends[1] < high / factor):
        return None
    word = "longer" if longer else "shorter"
    against = ", ".join(f"of those generated in {name} {value:.1f}" for name, value in means.items())
    order = np.argsort(-lengths if longer else lengths, kind="stable")
    return Alarm(
        "length_drifts",
        f"What was kept is much {word} than what was generated",
        f"the mean length of kept answers is {ranged(found, 1)}, {against}",
        {"selected": found, "generated": means.get("this round"), "first": means.get("round 1")},
        [(name_of(kept, row), f"length {lengths[row]:.0f}") for row in one_a_prompt(kept, order)],
    )


def near_duplicates(sets: Mapping[str, Measures], first: Measures, kept: pa.Table, rise: float) -> Alarm | None:
    """Raised where the share of kept answers that nearly repeat another prompt's rose by this since round 1's draws.

    Answers that are alike from the beginning, such as the letters of a multiple choice, raise nothing. Names answers of
    the largest clusters, a prompt each.
    """
    here, there = sets["selected"].get("near_duplicates"), first.get("near_duplicates")
    if kept.num_rows < FEWEST or here is None or there is None or here - there <= rise:
        return None
    clusters = repeats(texts_of(kept), prompt_numbers(kept))
    rows = [row for cluster in clusters for row in cluster]
    others = {row: len({kept.column("prompt_id")[i].as_py() for i in c}) - 1 for c in clusters for row in c}
    return Alarm(
        "near_duplicates",
        "Answers kept for different prompts are nearly the same",
        f"{share(here)} of the {kept.num_rows} kept answers nearly repeat one of another prompt; of as many "
        f"generated in "
        f"round 1 {share(there)}",
        {"selected": here, "first": there, "clusters": [len(cluster) for cluster in clusters[:SHOWN]]},
        [
            (name_of(kept, row), f"nearly the same as answers kept for {others[row]} other prompts")
            for row in one_a_prompt(kept, rows)
        ],
    )


def repeats(texts: Sequence[str], groups: IntArray) -> list[list[int]]:
    """Clusters of near-duplicates in which there are answers to two prompts or more, the largest first."""
    return [cluster for cluster in duplicates(texts) if len(set(groups[cluster].tolist())) > 1]


# -- the parts of the score -------------------------------------------------------------------------------------------


def part_dominates(samples: pa.Table, factors: Mapping[str, float], limit: float) -> Alarm | None:
    """Raised where one reward accounts for so much of the score's differences inside a prompt that others hardly count.

    Its share is the covariance of its weighted part with the score over the score's variance, both around the prompt's
    means: all shares sum to 1, and one is above 1 where the others pull the other way. Others that do not differ in at
    least half of the prompts, as a format that all keep, are no reason to look. Names kept samples that the others rate
    the lowest in their prompts.
    """
    competed = samples.filter(pc.is_finite(pc.cast(samples.column("score"), pa.float64())))
    names = [name for name in factors if factors[name] and f"rewards/{name}" in samples.column_names]
    if len(names) < 2 or competed.num_rows < FEWEST:
        return None
    groups = prompt_numbers(competed)
    parts = np.stack([around_mean(groups, counts(competed, name) * factors[name]) for name in names])
    score = parts.sum(axis=0)
    if not (variance := float(score @ score)) > 0:
        return None
    shares = parts @ score / variance
    top = int(np.argmax(shares))
    part, rest = parts[top], score - parts[top]
    differ = spread_in(groups, rest) > 1e-9 * math.sqrt(variance / len(score))
    if shares[top] < limit or 2 * np.count_nonzero(differ) < len(differ):
        return None
    alike = int(np.sum(leaders(groups, score) == leaders(groups, part)))
    said = ", ".join(f"{names[i]} {share(shares[i])}" for i in np.argsort(-shares) if i != top)
    kept = np.flatnonzero(column(competed, "weight") > 0)
    words = "{name} {part:+.3g} against the mean of its prompt, the others {rest:+.3g}"
    return Alarm(
        "part_dominates",
        "One reward decides nearly alone",
        f"{names[top]} accounts for {share(shares[top])} of the differences of the score among a prompt's samples "
        f"({said}); by it alone {alike} of {len(differ)} prompts would have the same best sample",
        {"part": names[top], "shares": dict(zip(names, shares.tolist(), strict=True)), "same_best": alike},
        [
            (name_of(competed, row), words.format(name=names[top], part=part[row], rest=rest[row]))
            for row in one_a_prompt(competed, kept[np.argsort(rest[kept], kind="stable")])
        ],
    )


def counts(samples: pa.Table, name: str) -> FloatArray:
    """(N,) what the reward counts in the score, unweighted: its value, or what stands beside it in its place."""
    return column(samples, f"counts/{name}" if f"counts/{name}" in samples.column_names else f"rewards/{name}")


def around_mean(groups: IntArray, values: FloatArray) -> FloatArray:
    """(N,) each value less the mean of its prompt; a part that does not apply adds nothing to the score, so it is 0."""
    values = np.nan_to_num(values)
    return np.asarray(values - mean_by_prompt(groups, values)[groups])


def spread_in(groups: IntArray, values: FloatArray) -> FloatArray:
    """(P,) the largest less the smallest value of each prompt that has one."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    return np.asarray(np.maximum.reduceat(values[order], starts) - np.minimum.reduceat(values[order], starts))


def leaders(groups: IntArray, values: FloatArray) -> IntArray:
    """(P,) the row of the highest value of each prompt, the first of equals."""
    order = np.lexsort((np.arange(len(values)), -np.round(values, 12), groups))
    return np.asarray(order[np.flatnonzero(np.diff(groups[order], prepend=-1))])


# -- the start --------------------------------------------------------------------------------------------------------


def kl_beyond_budget(held_out: pa.Table, budget: float) -> Alarm | None:
    """Raised where the KL to the start, the mean over prompts, is above the budget; both in nats per answer.

    Names the held-out answers that the start would have given the least, as against now.
    """
    found = interval(mean_by_prompt(prompt_numbers(held_out), column(held_out, "log_ratio")))
    if found is None or found["mean"] <= budget:
        return None
    return far_from_start(
        held_out,
        "The policy is farther from the start than its budget",
        f"the KL to the start is {ranged(found)} nats per answer; the budget is {budget:g}",
        {"kl": found, "budget": budget},
    )


def kl_beyond_selection(held_out: pa.Table, rounds: int, pool: float, most: float) -> Alarm | None:
    """Raised where the KL to the start is above what selection can teach, and above `most` nats a token.

    What is kept of `pool` candidates is at most `pool` times as likely as it was: a policy that learned its law, and
    nothing else, is after R rounds at most R log(pool) nats from the start. A fit to few rows may go beyond it, hence
    the second condition, which needs counted tokens. Names the same answers as `kl_beyond_budget`.
    """
    if "length" not in held_out.column_names:
        return None
    groups, ratio, tokens = prompt_numbers(held_out), column(held_out, "log_ratio"), column(held_out, "length")
    found, known_ratio = interval(mean_by_prompt(groups, ratio)), np.isfinite(ratio)
    if found is None or not (counted := float(tokens[known_ratio].sum())) > 0:
        return None
    taught, per_token = rounds * math.log(max(pool, 1.0)), float(ratio[known_ratio].sum()) / counted
    if found["mean"] <= taught or per_token <= most:
        return None
    in_rounds = "1 round" if rounds == 1 else f"{rounds} rounds"
    return far_from_start(
        held_out,
        "The policy is farther from the start than its selection explains",
        f"the KL to the start is {ranged(found)} nats per answer, {per_token:.2f} a token; to choose among {pool:.0f} "
        f"for {in_rounds} explains at most {taught:.1f} nats",
        {"kl": found, "per_token": per_token, "taught": taught, "limit": most},
    )


def far_from_start(held_out: pa.Table, title: str, evidence: str, numbers: Mapping[str, Any]) -> Alarm:
    ratio = column(held_out, "log_ratio")
    order = np.argsort(-np.nan_to_num(ratio, nan=-np.inf), kind="stable")
    why = [
        (name_of(held_out, row), f"log p - log p0 is {ratio[row]:.1f} nats") for row in one_a_prompt(held_out, order)
    ]
    return Alarm("kl_beyond_budget", title, evidence, numbers, why)


# -- the fit ----------------------------------------------------------------------------------------------------------


def loss_diverges(losses: Sequence[float], factor: float) -> Alarm | None:
    """Raised where the mean loss of the last tenth of a round's steps is so many times that of the first tenth."""
    tenth = -(-len(losses) // 10)
    if len(losses) < 4:
        return None
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    if first <= 0 or last <= factor * first:
        return None
    steps = "the first step" if tenth == 1 else f"the first {tenth} steps"
    return Alarm(
        "loss_diverges",
        "The loss rose while the policy was trained",
        f"the mean loss of {steps} is {first:.3g} and that of the last is {last:.3g}, of {len(losses)} steps; a "
        "smaller learning rate may help",
        {"first": first, "last": last, "steps": len(losses)},
        [],
    )


# -- answers that teach nothing ---------------------------------------------------------------------------------------

Sets = Mapping[str, pa.Table]  # samples that were generated to learn from, kept of these, held out, or tried by `plan`
ANSWERS = {"generated": "generated", "kept": "kept", "held_out": "held-out", "tried": "tried"}
PROMPTS = ANSWERS | {"generated": "training"}


def empty_answers(sets: Sets, limit: float, fewest: int = FEWEST) -> Alarm | None:
    """Raised where more than this share of the answers of a set have no word. Names such answers, a prompt each."""
    return many(sets, "empty", limit, fewest, "empty_answers", "Many answers are empty", ("are empty", "is empty"))


def cut_off(sets: Sets, limit: float, fewest: int = FEWEST) -> Alarm | None:
    """Raised where more than this share of the answers of a set reached the longest length. Names some of them."""
    words = ("were cut off at max_completion_length", "was cut off")
    return many(sets, "clipped", limit, fewest, "cut_off", "Many answers are cut off", words)


def many(
    sets: Sets, flag: str, limit: float, fewest: int, alarm: AlarmName, title: str, words: tuple[str, str]
) -> Alarm | None:
    """The alarm where more than this share of the samples of a set of at least `fewest` bear the flag."""
    found: dict[str, tuple[int, int]] = {}  # of each set: how many bear it, of how many
    named: list[tuple[str, str]] = []
    for name, table in sets.items():
        if flag in table.column_names:
            values = column(table, flag)
            have, of = int(np.nansum(values)), int(np.isfinite(values).sum())
            if of >= max(fewest, 1):
                found[name] = (have, of)
                if not named and have > limit * of:
                    named = [
                        (name_of(table, row), words[1]) for row in one_a_prompt(table, np.flatnonzero(values == 1))
                    ]
    if not any(have > limit * of for have, of in found.values()):
        return None
    said = "; ".join(f"{have} of {of} {ANSWERS[n]} answers ({share(have / of)})" for n, (have, of) in found.items())
    return Alarm(alarm, title, f"{said} {words[0]}", {name: have / of for name, (have, of) in found.items()}, named)


def equal_scores(samples: pa.Table, limit: float, fewest: int = FEWEST) -> Alarm | None:
    """Raised where for more than this share of the prompts all candidates score the same: nothing can be ranked.

    Prompts with one candidate, or without a score, do not count. Names a candidate of each such prompt.
    """
    groups, scores = prompt_numbers(samples), column(samples, "score")
    several = np.bincount(groups)[groups] > 1
    rows = np.flatnonzero(several & np.isfinite(scores))
    rows = rows[np.argsort(groups[rows], kind="stable")]
    own = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1) if len(rows) else []
    tied = [prompt for prompt in own if np.ptp(scores[prompt]) == 0]
    if len(own) < max(fewest, 1) or len(tied) <= limit * len(own):
        return None
    values, times = np.unique([scores[prompt[0]] for prompt in tied], return_counts=True)
    often = f"{values[np.argmax(times)]:.4g}"
    said = often if len(values) == 1 else f"{often} most often"
    why = {int(p[0]): f"all {len(p)} candidates score {scores[p[0]]:.4g}" for p in tied}
    return Alarm(
        "equal_scores",
        "There is nothing to rank",
        f"for {len(tied)} of {len(own)} prompts ({share(len(tied) / len(own))}) all candidates score the same: {said}",
        {"prompts": len(own), "tied": len(tied), "share": len(tied) / len(own)},
        [(name_of(samples, row), why[row]) for row in one_a_prompt(samples, sorted(why))],
    )


def identical_candidates(sets: Sets, limit: float, fewest: int = FEWEST) -> Alarm | None:
    """Raised where for more than this share of a set's prompts all candidates are the same. Names one of each."""
    found: dict[str, tuple[int, int]] = {}
    named: list[tuple[str, str]] = []
    for name, table in sets.items():
        if "content" not in table.column_names:
            continue
        kinds = table.select(["prompt_id", "content"]).group_by("prompt_id")
        counted = kinds.aggregate([("content", "count_distinct"), ("content", "count")])
        counted = counted.filter(pc.greater(counted.column("content_count"), 1))
        same = counted.filter(pc.equal(counted.column("content_count_distinct"), 1))
        if counted.num_rows < max(fewest, 1):
            continue
        found[name] = (same.num_rows, counted.num_rows)
        if not named and same.num_rows > limit * counted.num_rows:
            rows = np.flatnonzero(pc.is_in(table.column("prompt_id"), same.column("prompt_id")).to_numpy())
            named = [
                (name_of(table, row), "all candidates of its prompt are the same") for row in one_a_prompt(table, rows)
            ]
    if not any(same > limit * of for same, of in found.values()):
        return None
    said = "; ".join(f"{same} of {of} {PROMPTS[n]} prompts ({share(same / of)})" for n, (same, of) in found.items())
    return Alarm(
        "identical_candidates",
        "A prompt's candidates are all the same",
        f"all candidates are the same for {said}",
        {name: same / of for name, (same, of) in found.items()},
        named,
    )


def with_looks(samples: pa.Table) -> pa.Table:
    """The samples with `empty`, `clipped` and `content` (equal where two are the same), as far as columns tell."""
    names, columns = samples.column_names, {}
    kind = samples.schema.field("completion").type if "completion" in names else pa.null()
    if "image_sha256" in names:
        columns["content"] = samples.column("image_sha256")
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        columns["empty"] = pc.equal(pc.utf8_trim_whitespace(samples.column("completion")), "")
        columns["content"] = samples.column("completion")
    if "finish" in names:
        columns["clipped"] = pc.equal(samples.column("finish"), "length")
    for name, values in columns.items():
        if name not in names:
            samples = samples.append_column(name, values)
    return samples


def probe_alarms(samples: pa.Table, limits: GuardsConfig) -> list[dict[str, Any]]:
    """The alarms that a round of such samples would raise, however few there are; as plain data, the evidence first.

    `samples` has one row a sample: sample_id, prompt_id, `completion` as stored, `score` (null where there
    is none), and where they are known finish and image_sha256.
    """
    sets = {"tried": with_looks(samples)}
    found = (
        empty_answers(sets, limits.empty_share, 1),
        cut_off(sets, limits.cut_off_share, 1),
        identical_candidates(sets, limits.identical_share, 1),
        equal_scores(samples, limits.equal_share, 1),
    )
    return [alarm.as_json(1) for alarm in found if alarm is not None]


# -- words and rows ---------------------------------------------------------------------------------------------------


def one_a_prompt(samples: pa.Table, rows: Iterable[Any]) -> Iterator[int]:
    """The first of the rows, at most one for each prompt, SHOWN at most."""
    ids, seen = samples.column("prompt_id"), set[str]()
    for row in rows:
        if len(seen) == SHOWN:
            return
        if (name := ids[int(row)].as_py()) not in seen:
            seen.add(name)
            yield int(row)


def name_of(samples: pa.Table, row: int) -> str:
    return str(samples.column("sample_id")[row].as_py())


def keys(samples: pa.Table) -> list[tuple[str, int]]:
    """Of each row what it has in common with the same sample of another round: prompt and k, and so the seed."""
    return list(zip(samples.column("prompt_id").to_pylist(), samples.column("k").to_pylist(), strict=True))


def texts_of(samples: pa.Table) -> list[str]:
    return [text or "" for text in samples.column("text").to_pylist()]


def column(samples: pa.Table, name: str) -> FloatArray:
    """The column as numbers, NaN where it is null."""
    return np.asarray(pc.cast(samples.column(name), pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def mean_of_prompts(samples: pa.Table | None, name: str) -> float:
    """The mean over prompts of the mean of their samples; -inf without a value."""
    if samples is None:
        return -math.inf
    means = mean_by_prompt(prompt_numbers(samples), column(samples, name))
    finite = means[np.isfinite(means)]
    return float(finite.mean()) if len(finite) else -math.inf


def known(found: Interval | None) -> Interval:
    assert found is not None, "differences that have a mean have an interval"
    return found


def ranged(found: Interval, digits: int = 2) -> str:
    """A mean with its 95 % interval: 1.31 [1.10, 1.52]."""
    return spread(found, digits)


def odds(chance: float) -> str:
    """A chance in words, to two digits, rounded so that it never sounds smaller than it is."""
    if chance * ONE_MILLION < 1:
        return "less than 1 round in a million"
    whole = math.floor(1 / chance)
    scale = 10 ** max(0, len(str(whole)) - 2)
    return f"at most 1 round in {whole // scale * scale:,}"
