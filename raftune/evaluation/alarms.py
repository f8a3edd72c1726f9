"""Measures and alarms of a round: what it generated against what it kept.

An alarm reports measurements, not causes: a message, numbers, and samples to look at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.config.guards import AlarmName, GuardsConfig
from raftune.evaluation.bootstrap import interval, mean_by_prompt, numbers_of, prompt_numbers
from raftune.evaluation.diversity import near_duplicates as duplicate_clusters
from raftune.evaluation.diversity import numbered, shingle_sets, similarities, word_measures
from raftune.evaluation.images import ALIKE, by_group, nearest, rms_distance, thumbnails
from raftune.evaluation.paired import sign_flip
from raftune.protocols import MonitorInput
from raftune.results.summary import ends_of, spread
from raftune.sanitize import percent

Measures = Mapping[str, Any]

SHOWN = 8  # samples that an alarm names, each of another prompt
FEWEST = 16  # kept samples below which rules that look at a set of them are silent
SIZES = 1.5  # factor between the words of two sets up to which their shares of distinct pairs are compared
LIKED = 0.75  # quantile of the trained score from which on a held-out sample counts as one that the reward likes


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm: a message, numbers, and samples as (sample id, reason)."""

    alarm: AlarmName
    title: str
    evidence: str
    numbers: Mapping[str, Any]
    samples: Sequence[tuple[str, str]]

    def as_json(self, round_: int) -> dict[str, Any]:
        samples = [{"sample_id": name, "why": why} for name, why in self.samples]
        facts = {"title": self.title, "evidence": self.evidence, "numbers": dict(self.numbers)}
        return {"alarm": self.alarm, "round": round_, **facts, "samples": samples}


@dataclass(frozen=True)
class RoundData:
    """What alarms read. `sets`: the policy's samples (`generated`), those of them that were `kept`, and `held_out`; or
    those that `plan` has `tried`. `generated` and `selected` are measures; `fewest` is the least size of a set that is
    compared with a share."""

    limits: GuardsConfig
    inputs: MonitorInput
    sets: Mapping[str, pa.Table]
    generated: Measures = field(default_factory=dict)
    selected: Measures = field(default_factory=dict)
    fewest: int = FEWEST

    @property
    def first(self) -> Measures:
        """The measures of what round 1 generated."""
        return self.inputs.first or self.generated


class RoundMonitor:
    """Computes the measures and alarms of a round, with the configured thresholds."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config

    def similarities(self, texts: Sequence[str], groups: IntArray) -> FloatArray:
        return similarities(texts, groups)

    def measures(self, inputs: MonitorInput) -> dict[str, dict[str, Any]]:
        """The measures of the policy's own samples, and of what was kept, each kept sample counting by its weight.

        Words and distances over a set are measured on sets of one size: the kept samples and the control. What cannot
        be measured is left out.
        """
        samples, sets = inputs.samples, sets_of(inputs)
        generated, kept = sets["generated"], sets["kept"]
        control = samples.filter(samples.column("control")) if "control" in samples.column_names else samples
        of_generated = means_of(generated, np.ones(generated.num_rows))
        of_kept = means_of(kept, numbers_of(kept, "weight"))
        if "text" in samples.column_names:
            similarity = mean_by_prompt(prompt_numbers(generated), numbers_of(generated, "similarity"))
            of_generated |= {"similarity": finite_mean(similarity)} | text_measures(control)
            similarity = similarities(texts_of(kept), prompt_numbers(kept))
            of_kept |= {"similarity": finite_mean(similarity)} | text_measures(kept)
        if "thumbnail" in samples.column_names:
            rows, small_ND = thumbnails(generated)
            distances = by_group(prompt_numbers(generated)[rows], small_ND, rms_distance)
            of_generated |= {"pixel_distance": finite_mean(distances)} | image_measures(control)
            of_kept |= image_measures(kept)
        of_generated |= {f"mismatch_{name}": inputs.mismatch.get(name) for name in ("mean", "p99")}
        return {
            name: {measure: value for measure, value in result.items() if value is not None}
            for name, result in (("generated", of_generated), ("selected", of_kept))
        }

    def alarms(self, inputs: MonitorInput, sets: Mapping[str, Measures]) -> list[dict[str, Any]]:
        """What a person should look at, as plain data."""
        return [alarm.as_json(inputs.round) for alarm in self.raised(inputs, sets)]

    def raised(self, inputs: MonitorInput, sets: Mapping[str, Measures]) -> Iterator[Alarm]:
        data = RoundData(self.config, inputs, sets_of(inputs), sets["generated"], sets["selected"])
        return (raised for alarm in ALARMS if (raised := alarm(data)) is not None)


def probe_alarms(samples: pa.Table, limits: GuardsConfig) -> list[dict[str, Any]]:
    """The alarms that a round of such samples would raise, however few there are, as plain data.

    `samples` has one row a sample: sample_id, prompt_id, `completion` as stored, `score` (null where there
    is none), and where they are known finish and image_sha256.
    """
    names, tried, columns = samples.column_names, samples, {}
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
            tried = tried.append_column(name, values)
    inputs = MonitorInput(1, samples, {}, None, [], "", None)
    data = RoundData(limits, inputs, {"tried": tried}, fewest=1)
    raised = flagged(data, "empty"), flagged(data, "clipped"), identical_candidates(data), equal_scores(data)
    return [alarm.as_json(1) for alarm in raised if alarm is not None]


# -- measures ---------------------------------------------------------------------------------------------------------


def sets_of(inputs: MonitorInput) -> dict[str, pa.Table]:
    samples = inputs.samples
    held_out = {} if inputs.held_out is None else {"held_out": inputs.held_out}
    kept = samples.filter(pc.greater(samples.column("weight"), 0))
    return {"generated": samples.filter(pc.equal(samples.column("source"), "policy")), **held_out, "kept": kept}


def means_of(samples: pa.Table, weights: FloatArray) -> dict[str, Any]:
    """How many samples there are, and the weighted means of what is known of them."""
    result: dict[str, Any] = {"samples": samples.num_rows}
    columns = {"score": "reward", "length": "length", "clipped": "clipped_ratio"}
    columns |= {name: name for name in ("brightness", "saturation", "contrast")}
    columns |= {name: name for name in samples.column_names if name.startswith("rewards/")}
    for name, measure in columns.items():
        if name in samples.column_names:
            finite = np.isfinite(values := numbers_of(samples, name))
            if weights[finite].sum() > 0:
                result[measure] = float(np.average(values[finite], weights=weights[finite]))
    return result


def text_measures(samples: pa.Table) -> dict[str, Any]:
    """How varied the texts are, and the share of them that nearly repeat one of another prompt."""
    texts = texts_of(samples)
    words = numbered(texts)
    result = word_measures(words) | {"words": len(words.ids)}
    if texts:
        result["near_duplicates"] = sum(map(len, repeats(texts, prompt_numbers(samples)))) / len(texts)
    return result


def image_measures(samples: pa.Table) -> dict[str, Any]:
    """How far the images are apart (root mean square of thumbnails, 0 … 1), and the share that nearly repeats one of
    another prompt; nothing of a set of fewer than two."""
    rows, small_ND = thumbnails(samples)
    if len(rows) < 2:
        return {}
    distances, _ = nearest(small_ND, prompt_numbers(samples)[rows])
    return {"spread": rms_distance(small_ND), "near_duplicates": float((distances <= ALIKE).mean())}


def finite_mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def texts_of(samples: pa.Table) -> list[str]:
    return [text or "" for text in samples.column("text").to_pylist()]


def repeats(texts: Sequence[str], groups: IntArray) -> list[list[int]]:
    """Clusters of near-duplicates in which there are completions to two prompts or more, the largest first."""
    return [cluster for cluster in duplicate_clusters(texts) if len(set(groups[cluster].tolist())) > 1]


def named(samples: pa.Table, rows: Iterable[Any], why: Callable[[int], str]) -> list[tuple[str, str]]:
    """Sample id and reason of the first of these rows, at most one a prompt and SHOWN in all."""
    ids, prompts = samples.column("sample_id"), samples.column("prompt_id")
    result: dict[str, tuple[str, str]] = {}
    for row in map(int, rows):
        if len(result) == SHOWN:
            break
        if (prompt := prompts[row].as_py()) not in result:
            result[prompt] = (str(ids[row].as_py()), why(row))
    return list(result.values())


# -- the held-out reward ----------------------------------------------------------------------------------------------


def held_out_falls(data: RoundData) -> Alarm | None:
    """Raised where, since the earlier round of the highest held-out reward, the held-out one fell and the trained rose.

    Both by paired differences: the same prompts with the same seeds. With t earlier rounds to choose from, the fall
    must be less likely by chance than false_alarms / t, so that false_alarms bounds the chance in every round
    (Bonferroni) that a policy whose held-out reward does not change raises this. Names the completions with the lowest
    held-out scores among the quarter with the highest trained ones.
    """
    now, earlier, judge = data.inputs.held_out, data.inputs.earlier, data.inputs.judge
    if now is None or all(table is None for table in earlier):
        return None
    levels = [
        None if table is None else finite_mean(mean_by_prompt(prompt_numbers(table), numbers_of(table, "held_out")))
        for table in earlier
    ]
    since = int(np.argmax([-math.inf if level is None else level for level in levels]))
    then = earlier[since]
    assert then is not None, "there is an earlier round with held-out samples"
    trained, held_out = (differences(now, then, name) for name in ("score", "held_out"))
    if not len(trained) or not len(held_out) or trained.mean() <= 0 or held_out.mean() >= 0:
        return None
    chance = by_chance(held_out) * len(earlier)
    if max(chance, by_chance(trained)) > data.limits.false_alarms:
        return None
    rise, fall = interval(trained), interval(-held_out)
    assert rise is not None
    start = f"round {since}" if since else "the start"

    columns = numbers_of(now, "score"), numbers_of(now, "held_out")
    liked = np.isfinite(columns).all(axis=0)
    liked &= columns[0] >= np.quantile(columns[0][liked], LIKED)
    order = np.flatnonzero(liked)
    order = order[np.lexsort((order, -columns[0][order], columns[1][order]))]
    keys, old_keys = (
        list(zip(*(t.column(c).to_pylist() for c in ("prompt_id", "k")), strict=True)) for t in (now, then)
    )
    before = dict(zip(old_keys, zip(numbers_of(then, "score"), numbers_of(then, "held_out"), strict=True), strict=True))

    def why(row: int) -> str:
        old = before.get(keys[row], (math.nan, math.nan))
        was = f"; at {start}, same seed: {old[0]:.3g} and {old[1]:.3g}" if np.isfinite(old).all() else ""
        return f"trained reward {columns[0][row]:.3g}, {judge} {columns[1][row]:.3g}{was}"

    return Alarm(
        "held_out_falls",
        "The held-out reward falls while the trained one rises",
        f"since {start}, on the same {rise['n']} held-out prompts and seeds, the trained reward rose by "
        f"{spread(rise, 2)} and {judge} fell by {spread(fall, 2)}; by chance in {odds(chance)}",
        {"since": since, "trained": rise, "held_out": interval(held_out), "chance": chance},
        named(now, order, why),
    )


def differences(now: pa.Table, then: pa.Table, name: str) -> FloatArray:
    """(P,) by how much the mean over a prompt's samples rose, for each prompt that both tables have a value for."""
    ids = pc.unique(now.column("prompt_id"))
    means = []
    for table in (now, then):
        groups = pc.index_in(table.column("prompt_id"), value_set=ids)
        values = numbers_of(table.filter(groups.is_valid()), name)
        mean = mean_by_prompt(np.asarray(groups.drop_null().to_numpy(), np.int64), values)
        means.append(np.concatenate([mean, np.full(len(ids) - len(mean), np.nan)]))
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


def odds(chance: float) -> str:
    """A chance in words, to two digits, rounded so that it never sounds smaller than it is."""
    if chance * 1_000_000 < 1:
        return "less than 1 round in a million"
    rounds = math.floor(1 / chance)
    scale = 10 ** max(0, len(str(rounds)) - 2)
    return f"at most 1 round in {rounds // scale * scale:,}"


# -- what was kept ----------------------------------------------------------------------------------------------------


def text_diversity_drops(data: RoundData) -> Alarm | None:
    """Raised where the kept completions' distinct-2 lost this share, against the samples of this round or of round 1.

    Each is measured on as many completions as were kept; that of round 1 is left out where the sizes are too unlike.
    Names the kept completions whose word pairs are the most common among all that were kept.
    """
    kept = data.sets["kept"]
    if "text" not in kept.column_names or kept.num_rows < FEWEST or "distinct_2" not in data.selected:
        return None
    here = data.selected["distinct_2"]
    others = {"this round": data.generated.get("distinct_2")}
    if 1 / SIZES <= data.selected["words"] / max(data.first.get("words", 0), 1) <= SIZES:
        others["round 1"] = data.first.get("distinct_2")
    lost = {name: 1 - here / value for name, value in others.items() if value}
    if max(lost.values(), default=0.0) <= data.limits.diversity_drop:
        return None
    against = ", ".join(f"in as many generated in {name} {percent(others[name] or 0.0)}" for name in lost)
    pairs = shingle_sets(numbered(texts_of(kept)))
    counts = np.bincount(np.concatenate(pairs))
    common = np.array([counts[shingles].mean() for shingles in pairs])
    numbers = {"selected": here, "generated": others["this round"], "first": others.get("round 1")}
    return Alarm(
        "diversity_drops",
        "What was kept is less varied than what was generated",
        f"of the word pairs in the {kept.num_rows} kept completions {percent(here)} are different; {against}",
        numbers | {"lost": max(lost.values())},
        named(
            kept,
            np.argsort(-common, kind="stable"),
            lambda row: f"its word pairs occur in {common[row]:.0f} of {len(pairs)} kept completions, on average",
        ),
    )


def image_diversity_drops(data: RoundData) -> Alarm | None:
    """Raised where images of one prompt, or kept ones of different prompts, have lost this share of their distance.

    Those of one prompt against round 1's; kept ones against as many generated in this round and in round 1. Names the
    kept images of the prompts whose images are the most alike.
    """
    generated, kept = data.sets["generated"], data.sets["kept"]
    if "thumbnail" not in kept.column_names or kept.num_rows < FEWEST:
        return None
    distance, kept_distance = data.generated.get("pixel_distance"), data.selected.get("spread")
    earlier = {"round 1": data.first.get("pixel_distance")}
    as_many = {
        "as many generated in this round": data.generated.get("spread"),
        "as many generated in round 1": data.first.get("spread"),
    }
    sentences, lost = [], [0.0]
    for noun, here, others in (
        ("images generated for one prompt", distance, earlier),
        ("images kept", kept_distance, as_many),
    ):
        losses = {name: 1 - here / value for name, value in others.items() if value and here is not None}
        if max(losses.values(), default=0.0) > data.limits.diversity_drop:
            than = ", ".join(f"in {name} {others[name]:.3f}" for name in losses)
            sentences.append(f"two {noun} are {here:.3f} apart; {than}")
            lost += losses.values()
    if not sentences:
        return None
    rows, small_ND = thumbnails(generated)
    groups = prompt_numbers(generated)[rows]
    prompts = pc.unique(generated.column("prompt_id")).to_pylist()
    apart = dict.fromkeys(prompts, math.nan)
    apart |= zip((prompts[i] for i in np.unique(groups)), by_group(groups, small_ND, rms_distance), strict=True)
    distances = np.array([apart.get(prompt, math.nan) for prompt in kept.column("prompt_id").to_pylist()])
    return Alarm(
        "diversity_drops",
        "Images are less varied than they were",
        "; ".join(sentences),
        {"pixel_distance": distance, "spread": kept_distance, "lost": max(lost)},
        named(
            kept,
            np.argsort(np.nan_to_num(distances, nan=np.inf), kind="stable"),
            lambda row: f"two images generated for its prompt are {distances[row]:.3f} apart, on average",
        ),
    )


def mean_drifts(data: RoundData, measure: str) -> Alarm | None:
    """Raised where the mean of what was kept is far from that of the samples of this round or of round 1.

    By the whole 95 % interval over prompts: kept completions are so many times as long, or as short; kept images are so
    much more, or less, saturated, or have lost this share of their contrast. Names the most extreme of what was kept.
    """
    kept, limits = data.sets["kept"], data.limits
    if measure not in kept.column_names or kept.num_rows < FEWEST:
        return None
    values = numbers_of(kept, measure)
    kept_mean = interval(mean_by_prompt(prompt_numbers(kept), values))
    ends = ends_of(kept_mean) if kept_mean is not None else None
    generated = {"this round": data.generated.get(measure), "round 1": data.first.get(measure)}
    means = {name: mean for name, mean in generated.items() if mean is not None and (mean or measure != "length")}
    if ends is None or not means:
        return None
    least, most = min(means.values()), max(means.values())
    alarm: AlarmName
    if measure == "length":
        alarm, noun, digits, sample_digits = "length_drifts", "completions", 1, 0
        above, below = limits.length_factor * least, most / limits.length_factor
        words = ("is much longer", "is much shorter")
    elif measure == "saturation":
        alarm, noun, digits, sample_digits = "saturation_drifts", "images", 2, 2
        above, below = least + limits.saturation_drift, most - limits.saturation_drift
        words = ("is much more saturated", "is much less saturated")
    else:
        alarm, noun, digits, sample_digits = "contrast_drops", "images", 2, 3
        above, below = math.inf, (1 - limits.contrast_drop) * most
        words = ("", "has much less contrast")
    if ends[0] <= above and ends[1] >= below:
        return None
    rising = ends[0] > above
    against = ", ".join(f"of those generated in {name} {mean:.{digits}f}" for name, mean in means.items())
    return Alarm(
        alarm,
        f"What was kept {words[0 if rising else 1]} than what was generated",
        f"the mean {measure} of kept {noun} is {spread(kept_mean, digits)}, {against}",
        {"selected": kept_mean, "generated": means.get("this round"), "first": means.get("round 1")},
        named(
            kept,
            np.argsort(-values if rising else values, kind="stable"),
            lambda row: f"{measure} {values[row]:.{sample_digits}f}",
        ),
    )


def near_duplicates(data: RoundData) -> Alarm | None:
    """Raised where the share of kept samples that nearly repeat another prompt's rose by this above round 1's.

    Completions that are alike from the beginning, such as the letters of a multiple choice, raise nothing. Names
    completions of the largest clusters, or the images nearest to another prompt's, a prompt each.
    """
    kept = data.sets["kept"]
    here, there = data.selected.get("near_duplicates"), data.first.get("near_duplicates")
    rise = data.limits.duplicate_rise
    if kept.num_rows < FEWEST or here is None or there is None or here - there <= rise:
        return None
    noun, numbers = "images", {"selected": here, "first": there}
    if "text" in kept.column_names:
        noun, clusters = "completions", repeats(texts_of(kept), prompt_numbers(kept))
        numbers["clusters"] = [len(cluster) for cluster in clusters[:SHOWN]]
        prompts = kept.column("prompt_id").to_pylist()
        others = {row: len({prompts[i] for i in cluster}) - 1 for cluster in clusters for row in cluster}
        samples = named(
            kept, others, lambda row: f"nearly the same as completions kept for {others[row]} other prompts"
        )
    else:
        rows, small_ND = thumbnails(kept)
        distances, twins = nearest(small_ND, prompt_numbers(kept)[rows])
        order = [i for i in np.argsort(distances, kind="stable") if distances[i] <= ALIKE]
        place_of = {int(rows[i]): i for i in order}
        ids = kept.column("sample_id")

        def why(row: int) -> str:
            i = place_of[row]
            return f"{distances[i]:.3f} from {ids[int(rows[twins[i]])].as_py()}, of another prompt"

        samples = named(kept, place_of, why)
    return Alarm(
        "near_duplicates",
        f"{noun.capitalize()} kept for different prompts are nearly the same",
        f"{percent(here)} of the {kept.num_rows} kept {noun} nearly repeat one of another prompt; of as many "
        f"generated in round 1 {percent(there)}",
        numbers,
        samples,
    )


# -- the parts of the score -------------------------------------------------------------------------------------------


def part_dominates(data: RoundData) -> Alarm | None:
    """Raised where one reward accounts for so much of the score's differences inside a prompt that others hardly count.

    Its share is the covariance of its weighted part with the score over the score's variance, both around the prompt's
    means: all shares sum to 1, and one is above 1 where the others pull the other way. Others that do not differ in at
    least half of the prompts, as a format that all keep, are no reason to look. Names kept samples that the others rate
    the lowest in their prompts.
    """
    samples, factors = data.inputs.samples, data.inputs.factors
    competed = samples.filter(pc.is_finite(pc.cast(samples.column("score"), pa.float64())))
    names = [name for name in factors if factors[name] and f"rewards/{name}" in samples.column_names]
    if len(names) < 2 or competed.num_rows < FEWEST:
        return None
    groups = prompt_numbers(competed)
    parts = []
    for name in names:  # counts/NAME is what a reward counts in the score where that is not its value
        column = f"counts/{name}" if f"counts/{name}" in competed.column_names else f"rewards/{name}"
        values = np.nan_to_num(numbers_of(competed, column) * factors[name])  # a part that does not apply adds nothing
        parts.append(values - mean_by_prompt(groups, values)[groups])
    score = np.sum(parts, axis=0)
    if not (variance := float(score @ score)) > 0:
        return None
    shares = np.stack(parts) @ score / variance
    top = int(np.argmax(shares))
    part, rest = parts[top], score - parts[top]

    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    spreads = np.maximum.reduceat(rest[order], starts) - np.minimum.reduceat(rest[order], starts)
    differ = spreads > 1e-9 * math.sqrt(variance / len(score))
    if shares[top] < data.limits.part_share or 2 * np.count_nonzero(differ) < len(differ):
        return None
    # (P,) the row of the highest value of each prompt, the first of equals
    leaders = [np.lexsort((np.arange(len(v)), -np.round(v, 12), groups))[starts] for v in (score, part)]
    same_best = int(np.sum(leaders[0] == leaders[1]))
    others = ", ".join(f"{names[i]} {percent(shares[i])}" for i in np.argsort(-shares) if i != top)
    kept = np.flatnonzero(numbers_of(competed, "weight") > 0)
    return Alarm(
        "part_dominates",
        "One reward decides nearly alone",
        f"{names[top]} accounts for {percent(shares[top])} of the differences of the score among a prompt's samples "
        f"({others}); by it alone {same_best} of {len(differ)} prompts would have the same best sample",
        {"part": names[top], "shares": dict(zip(names, shares.tolist(), strict=True)), "same_best": same_best},
        named(
            competed,
            kept[np.argsort(rest[kept], kind="stable")],
            lambda row: f"{names[top]} {part[row]:+.3g} against the mean of its prompt, the others {rest[row]:+.3g}",
        ),
    )


# -- the start, and the training --------------------------------------------------------------------------------------


def kl_beyond_budget(data: RoundData) -> Alarm | None:
    """Raised where the KL to the start, the mean over prompts in nats per completion, is above the budget.

    Without a budget, where it is above what selection can teach, and above max_kl_per_token nats a token: what is kept
    of K candidates is at most K times as likely as it was, so that a policy that learned its law, and nothing else, is
    after R rounds at most R log(K) nats from the start. A fit to few rows may go beyond it, hence the second condition,
    which needs counted tokens. Names the held-out completions that are least likely under the start, compared with now.
    """
    held_out, samples, budget = data.inputs.held_out, data.inputs.samples, data.limits.max_kl
    if held_out is None or "log_ratio" not in held_out.column_names:
        return None
    ratio = numbers_of(held_out, "log_ratio")
    kl = interval(mean_by_prompt(prompt_numbers(held_out), ratio))
    if kl is None:
        return None
    numbers: dict[str, Any] = {"kl": kl}
    if budget is not None:
        if kl["mean"] <= budget:
            return None
        title, numbers = "its budget", numbers | {"budget": budget}
        evidence = f"the KL to the start is {spread(kl, 2)} nats per completion; the budget is {budget:g}"
    else:
        finite = np.isfinite(ratio)
        tokens = numbers_of(held_out, "length")[finite].sum() if "length" in held_out.column_names else 0.0
        if not tokens > 0:
            return None
        rounds, most = data.inputs.round, data.limits.max_kl_per_token
        candidates = samples.num_rows / max(1, len(pc.unique(samples.column("prompt_id"))))
        taught, per_token = rounds * math.log(max(candidates, 1.0)), float(ratio[finite].sum() / tokens)
        if kl["mean"] <= taught or per_token <= most:
            return None
        title = "its selection explains"
        numbers |= {"per_token": per_token, "taught": taught, "limit": most}
        evidence = (
            f"the KL to the start is {spread(kl, 2)} nats per completion, {per_token:.2f} a token; to choose among "
            f"{candidates:.0f} for {rounds} round{'s' * (rounds != 1)} explains at most {taught:.1f} nats"
        )
    return Alarm(
        "kl_beyond_budget",
        f"The policy is farther from the start than {title}",
        evidence,
        numbers,
        named(
            held_out,
            np.argsort(-np.nan_to_num(ratio, nan=-np.inf), kind="stable"),
            lambda row: f"log p - log p0 is {ratio[row]:.1f} nats",
        ),
    )


def log_probs_mismatch(data: RoundData) -> Alarm | None:
    """Raised where the log-probabilities recorded while generating are not those of the trainer's own forward: another
    model generated than was trained (stale weights), or the backend computes something else. Names the worst samples.
    """
    measured = data.inputs.mismatch
    if not measured or measured["mean"] <= (allowed := data.limits.max_mismatch or measured["allowed"]):
        return None
    numbers = {name: measured[name] for name in ("mean", "p99", "max", "tokens", "completions")}
    return Alarm(
        "log_probs_mismatch",
        "Recorded log-probabilities are not the trained model's",
        f"those recorded while generating are {measured['mean']:.2g} nats a token from the trainer's own (99th "
        f"percentile {measured['p99']:.2g}; {measured['tokens']} tokens of {measured['completions']} completions); "
        f"{allowed:.2g} are allowed",
        numbers | {"allowed": allowed},
        [(name, f"{nats:.2g} nats a token from the trainer's") for name, nats in measured["worst"] if nats > allowed],
    )


def loss_diverges(data: RoundData) -> Alarm | None:
    """Raised where the mean loss of the last tenth of a round's steps is so many times that of the first tenth."""
    losses = data.inputs.losses
    tenth = -(-len(losses) // 10)
    if len(losses) < 4:
        return None
    first, last = float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:]))
    if first <= 0 or last <= data.limits.loss_factor * first:
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


# -- completions that teach nothing ------------------------------------------------------------------------------------


def equal_scores(data: RoundData) -> Alarm | None:
    """Raised where for more than this share of the prompts all candidates score the same: nothing can be ranked.

    Prompts with one candidate, or without a score, do not count. Names a candidate of each such prompt.
    """
    samples = data.inputs.samples
    groups, scores = prompt_numbers(samples), numbers_of(samples, "score")
    rows = np.flatnonzero((np.bincount(groups)[groups] > 1) & np.isfinite(scores))
    rows = rows[np.argsort(groups[rows], kind="stable")]
    prompts = np.split(rows, np.flatnonzero(np.diff(groups[rows])) + 1) if len(rows) else []
    tied = {int(prompt[0]): len(prompt) for prompt in prompts if np.ptp(scores[prompt]) == 0}
    if len(prompts) < data.fewest or len(tied) <= data.limits.equal_share * len(prompts):
        return None
    values, times = np.unique(scores[list(tied)], return_counts=True)
    most = f"{values[np.argmax(times)]:.4g}{'' if len(values) == 1 else ' most often'}"
    share = len(tied) / len(prompts)
    return Alarm(
        "equal_scores",
        "There is nothing to rank",
        f"for {len(tied)} of {len(prompts)} prompts ({percent(share)}) all candidates score the same: {most}",
        {"prompts": len(prompts), "tied": len(tied), "share": share},
        named(samples, sorted(tied), lambda row: f"all {tied[row]} candidates score {scores[row]:.4g}"),
    )


def identical_candidates(data: RoundData) -> Alarm | None:
    """Raised where for more than this share of a set's prompts all candidates are the same. Names one of each."""
    units = {"generated": "training prompts", "held_out": "held-out prompts", "tried": "tried prompts"}
    sets = {}
    for name, unit in units.items():
        table = data.sets.get(name)
        if table is not None and "content" in table.column_names:
            kinds = table.select(["prompt_id", "content"]).group_by("prompt_id")
            prompts = kinds.aggregate([("content", "count_distinct"), ("content", "count")])
            prompts = prompts.filter(pc.greater(prompts.column("content_count"), 1))
            same = prompts.filter(pc.equal(prompts.column("content_count_distinct"), 1))
            rows = np.flatnonzero(pc.is_in(table.column("prompt_id"), same.column("prompt_id")).to_numpy())
            sets[name] = (unit, same.num_rows, prompts.num_rows, rows)
    title, sentence = "A prompt's candidates are all the same", "all candidates are the same for {}"
    reason, limit = "all candidates of its prompt are the same", data.limits.identical_share
    return share_above(data, sets, limit, "identical_candidates", title, sentence, reason)


def flagged(data: RoundData, flag: str) -> Alarm | None:
    """Raised where more than this share of the completions of a set are empty, or were cut off. Names some of them."""
    sets = {}
    for name, table in data.sets.items():
        if flag in table.column_names:
            values = numbers_of(table, flag)
            rows, measured = np.flatnonzero(values == 1), int(np.isfinite(values).sum())
            sets[name] = (f"{name.replace('_', '-')} completions", len(rows), measured, rows)
    if flag == "empty":
        title, limit = "Many completions are empty", data.limits.empty_share
        return share_above(data, sets, limit, "empty_answers", title, "{} are empty", "is empty")
    title, sentence = "Many completions are cut off", "{} were cut off at max_completion_length"
    return share_above(data, sets, data.limits.cut_off_share, "cut_off", title, sentence, "was cut off")


def share_above(
    data: RoundData,
    sets: Mapping[str, tuple[str, int, int, IntArray]],
    limit: float,
    alarm: AlarmName,
    title: str,
    sentence: str,
    reason: str,
) -> Alarm | None:
    """The alarm where of a large enough set a greater share than the limit has a property.

    `sets` holds a set's unit, how many have it, of how many, and the rows to name.
    """
    sets = {name: counts for name, counts in sets.items() if counts[2] >= data.fewest}
    above = next((name for name, (_, count, total, _) in sets.items() if count > limit * total), None)
    if above is None:
        return None
    shares = {name: count / total for name, (_, count, total, _) in sets.items()}
    listed = [f"{n} of {total} {unit} ({percent(n / total)})" for unit, n, total, _ in sets.values()]
    samples = named(data.sets[above], sets[above][3], lambda row: reason)
    return Alarm(alarm, title, sentence.format("; ".join(listed)), shares, samples)


# In the order in which a round's alarms are listed.
ALARMS: tuple[Callable[[RoundData], Alarm | None], ...] = (
    held_out_falls,
    text_diversity_drops,
    partial(mean_drifts, measure="length"),
    partial(mean_drifts, measure="saturation"),
    partial(mean_drifts, measure="contrast"),
    image_diversity_drops,
    near_duplicates,
    part_dominates,
    kl_beyond_budget,
    loss_diverges,
    log_probs_mismatch,
    equal_scores,
    identical_candidates,
    partial(flagged, flag="empty"),
    partial(flagged, flag="clipped"),
)
