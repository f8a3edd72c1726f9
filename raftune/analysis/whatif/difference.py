"""Compares two training sets over the same samples: overlap, differences and scores."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import BoolArray, FloatArray, IntArray
from raftune.evaluation.bootstrap import best_of_k_estimates
from raftune.results.samples import prompts_of, read_drawn, readable
from raftune.results.summary import read_json
from raftune.stages.plan import read_plan
from raftune.stages.select import read_verdicts
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class KeptSamples:
    """One training set: its samples, its prompts, and its mean by each score, weighted as it would be learned from.

    `reward_now` is by the scores that the what-if goes by; both are the same where nothing was scored anew.
    """

    samples: int
    prompts: int
    reward_before: float | None
    reward_now: float | None


@dataclass(frozen=True)
class SelectionChange:
    """How the training set of a round (None: of all) would have changed. Counts of samples, but for those of prompts.

    changed: prompts of which other samples are kept, or with other weights. starved: prompts that now yield nothing.
    """

    round: int | None
    prompts: int
    changed: int
    in_both: int
    only_before: int
    only_now: int
    starved_before: int
    empty_prompts: int
    before: KeptSamples
    now: KeptSamples


@dataclass(frozen=True)
class BestOfEstimate:
    """Unbiased estimate of the best of k samples, and its share of the gain of all K.

    `left_out`: prompts of which a sample has no usable score, which would bias it.
    """

    prompts: int
    left_out: int
    rewards: dict[int, float]
    shares: dict[int, float]


@dataclass(frozen=True)
class Difference:
    """Differences of all rounds. `names`: rewards of the run, and of the what-if; equal if not rescored.

    largest: the prompts with the largest margins among those that changed, as plain data with their answers;
    starved: prompts that yield nothing now and did before, each with its reason.
    """

    names: tuple[str, str]
    rescored: bool
    rounds: list[SelectionChange]
    all: SelectionChange
    best_of: BestOfEstimate
    largest: list[dict[str, Any]] = field(default_factory=list)
    empty_prompts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ChunkVerdicts:
    """The samples of one chunk, row for row: scores and weights before and now. `group` numbers the prompts."""

    round: int
    chunk: int
    prompts: list[str]
    group: IntArray
    k: IntArray
    drawn: BoolArray
    old: FloatArray
    new: FloatArray
    before: FloatArray
    now: FloatArray

    def per_prompt(self, values: Any) -> FloatArray:
        """Sums over each prompt's samples."""
        return np.bincount(self.group, weights=values, minlength=len(self.prompts)).astype(np.float64)


def compare(before: RunFolder, now: RunFolder, rounds: list[int], show: int) -> Difference:
    """What the run learned from in these rounds, against what it would have; `show` prompts in their answers' words."""
    rescored = any(before.folder(r, "score") != now.folder(r, "score") for r in rounds)
    tallies = {round_: ChangeTally() for round_ in rounds}
    curve = BestOfCurve()
    largest: list[tuple[float, int, ChunkVerdicts, int]] = []
    order = itertools.count()
    for pair in pairs(before, now, rounds):
        tallies[pair.round].add(pair)
        curve.add(pair, read_plan(now.folder(pair.round, "plan"))["num_generations"])
        margin = margins(pair)
        found = ((abs(margin[g]), -next(order), pair, g) for g in np.flatnonzero(changed(pair)).tolist())
        largest = heapq.nlargest(show, [*largest, *found], key=lambda item: item[:2])
    everything = ChangeTally()
    for tally in tallies.values():
        everything.counts.update(tally.counts)  # Counter's + would drop sums that are below 0
    names = (names_of(before, rounds[0]), names_of(now, rounds[0]))
    return Difference(
        names if names[0] != names[1] or not rescored else (f"{names[0]} (the run's)", f"{names[1]} (now)"),
        rescored,
        [tally.change(round_) for round_, tally in tallies.items()],
        everything.change(None),
        curve.estimate(),
        [told(now, pair, g, margins(pair)[g]) for _, _, pair, g in largest],
        list(itertools.islice(newly_empty(before, now, rounds), show)),
    )


def pairs(before: RunFolder, now: RunFolder, rounds: list[int]) -> Iterator[ChunkVerdicts]:
    """Every chunk that either selected from."""
    for round_ in rounds:
        new_verdicts = dict(read_verdicts(now.folder(round_, "select") / "verdicts.parquet", ["sample_id", "weight"]))
        columns = ["sample_id", "prompt_id", "k", "source", "score", "weight"]
        for chunk, old in read_verdicts(before.folder(round_, "select") / "verdicts.parquet", columns):
            scored = now.folder(round_, "score") / chunk_file(chunk)
            yield paired(round_, chunk, old, scored if scored.is_file() else None, new_verdicts.get(chunk))


def paired(round_: int, chunk: int, old: pa.Table, scored: Path | None, verdicts: pa.Table | None) -> ChunkVerdicts:
    """The chunk's samples with both scores and both weights; what took no part now has weight 0."""
    codes = old.column("prompt_id").combine_chunks().dictionary_encode()
    new = np.full(old.num_rows, np.nan)
    if scored is not None:
        table = read_table(scored, ["score", "status"])
        new = floats(pc.if_else(pc.equal(table.column("status"), "ok"), table.column("score"), None))
    weight = np.zeros(old.num_rows)
    if verdicts is not None:
        at = pc.index_in(verdicts.column("sample_id"), value_set=old.column("sample_id").combine_chunks())
        weight[at.to_numpy()] = verdicts.column("weight").to_numpy()
    return ChunkVerdicts(
        round_,
        chunk,
        codes.dictionary.to_pylist(),
        codes.indices.to_numpy().astype(np.int64),
        old.column("k").to_numpy().astype(np.int64),
        pc.equal(old.column("source"), "policy").to_numpy(zero_copy_only=False),
        floats(old.column("score")),
        new,
        old.column("weight").to_numpy(),
        weight,
    )


def floats(column: pa.ChunkedArray) -> FloatArray:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def changed(pair: ChunkVerdicts) -> BoolArray:
    """(G,) whether something else would be learned from the prompt."""
    return np.asarray(pair.per_prompt(np.abs(pair.before - pair.now) > 1e-12) > 0)


def margins(pair: ChunkVerdicts) -> FloatArray:
    """(G,) by how much the mean score of what is kept now exceeds that of what was kept before, by the score now.

    Where one of the two keeps nothing of a prompt, the mean of all its samples stands in.
    """
    usable = np.isfinite(pair.new)
    value = np.where(usable, pair.new, 0.0)
    with np.errstate(invalid="ignore"):
        every = pair.per_prompt(value) / pair.per_prompt(usable)
        now, before = (
            pair.per_prompt(value * w * usable) / pair.per_prompt(w * usable) for w in (pair.now, pair.before)
        )
    gain = np.where(np.isnan(now), every, now) - np.where(np.isnan(before), every, before)
    return np.where(np.isnan(gain), 0.0, gain)


@dataclass
class ChangeTally:
    """Sums over chunks, from which a SelectionChange is made."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, pair: ChunkVerdicts) -> None:
        was, is_ = pair.before > 0, pair.now > 0
        sums = {
            "prompts": len(pair.prompts),
            "changed": changed(pair).sum(),
            "in_both": (was & is_).sum(),
            "only_before": (was & ~is_).sum(),
            "only_now": (is_ & ~was).sum(),
            **weighed("before", pair, pair.before),
            **weighed("now", pair, pair.now),
        }
        for name, value in sums.items():
            self.counts[name] += value

    def change(self, round_: int | None) -> SelectionChange:
        c = self.counts
        before, now = (self.kept(which) for which in ("before", "now"))
        prompts, altered, both, gone, new = (
            int(c[name]) for name in ("prompts", "changed", "in_both", "only_before", "only_now")
        )
        empty_prompts = (prompts - before.prompts, prompts - now.prompts)
        return SelectionChange(round_, prompts, altered, both, gone, new, *empty_prompts, before, now)

    def kept(self, which: str) -> KeptSamples:
        c = self.counts
        old, new = (
            float(c[f"{which} {by}"] / c[f"{which} {by} weight"]) if c[f"{which} {by} weight"] else None
            for by in ("old", "new")
        )
        return KeptSamples(int(c[f"{which} samples"]), int(c[f"{which} prompts"]), old, new)


def weighed(which: str, pair: ChunkVerdicts, weight: FloatArray) -> dict[str, Any]:
    """The sums that one training set's numbers are read from."""
    found: dict[str, Any] = {
        f"{which} samples": (weight > 0).sum(),
        f"{which} prompts": (pair.per_prompt(weight > 0) > 0).sum(),
    }
    for by, values in (("old", pair.old), ("new", pair.new)):
        usable = np.isfinite(values)
        found[f"{which} {by}"] = (weight[usable] * values[usable]).sum()
        found[f"{which} {by} weight"] = weight[usable].sum()
    return found


class BestOfCurve:
    """Sums of best-of-k estimates over prompts, of the policy's own samples alone."""

    def __init__(self) -> None:
        self.sums: dict[int, FloatArray] = {}
        self.prompts: Counter[int] = Counter()
        self.left_out = 0

    def add(self, pair: ChunkVerdicts, drawn: int) -> None:
        rows = np.flatnonzero(pair.drawn)
        rows = rows[np.lexsort((pair.k[rows], pair.group[rows]))]
        scores = pair.new[rows].reshape(-1, drawn)
        whole = np.isfinite(scores).all(axis=1)
        self.left_out += int((~whole).sum())
        self.prompts[drawn] += int(whole.sum())
        estimates = best_of_k_estimates(scores[whole], ks_up_to(drawn)).sum(axis=0)
        self.sums[drawn] = self.sums.get(drawn, np.zeros(len(estimates))) + estimates

    def estimate(self) -> BestOfEstimate:
        """Over the prompts that generated the most, should rounds differ in K."""
        drawn = max((k for k, n in self.prompts.items() if n), default=0)
        if not drawn:
            return BestOfEstimate(0, self.left_out, {}, {})
        means = (self.sums[drawn] / self.prompts[drawn]).tolist()
        rewards = dict(zip(ks_up_to(drawn), means, strict=True))
        gain = rewards[drawn] - rewards[1]
        shares = {k: (value - rewards[1]) / gain for k, value in rewards.items() if k > 1 and gain > 0}
        return BestOfEstimate(self.prompts[drawn], self.left_out, rewards, shares)


def ks_up_to(most: int) -> list[int]:
    """1, 2, 4, … and the most."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def names_of(run: RunFolder, round_: int) -> str:
    """The rewards that gave the scores, joined."""
    folder = run.folder(round_, "score")
    files = [folder / chunk_file(chunk) for chunk in chunk_numbers(folder)]
    names = [n.removeprefix("rewards/") for n in column_names(files[0]) if n.startswith("rewards/")] if files else []
    return " + ".join(names)


def told(run: RunFolder, pair: ChunkVerdicts, group: int, margin: float) -> dict[str, Any]:
    """One prompt with the answers that either keeps: scores, weights, texts."""
    plan, name = run.folder(pair.round, "plan"), pair.prompts[group]
    shards = [run.folder(pair.round, shard) / chunk_file(pair.chunk) for shard in ("generate", "teach")]
    answers = {row["sample_id"]: row for path in shards if path.is_file() for row in read_drawn(path).to_pylist()}
    mine = [row for row in answers.values() if row["prompt_id"] == name]
    by_k = {row["k"]: row for row in mine}
    rows = np.flatnonzero((pair.group == group) & ((pair.before > 0) | (pair.now > 0)))
    return {
        "round": pair.round,
        "prompt_id": name,
        "prompt": prompts_of(plan, pair.chunk)[name],
        "margin": float(margin),
        "samples": [sample_of(by_k[int(pair.k[i])], pair, int(i)) for i in rows],
    }


def sample_of(row: dict[str, Any], pair: ChunkVerdicts, i: int) -> dict[str, Any]:
    return {
        "sample_id": row["sample_id"],
        "k": row["k"],
        "source": row["source"],
        "completion": readable(row["completion"]),
        "score_before": number(pair.old[i]),
        "score_now": number(pair.new[i]),
        "weight_before": float(pair.before[i]),
        "weight_now": float(pair.now[i]),
    }


def number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def newly_empty(before: RunFolder, now: RunFolder, rounds: list[int]) -> Iterator[dict[str, Any]]:
    """The prompts that yield nothing now and did before, with the reason."""
    for round_ in rounds:
        was, is_ = (read_json(run.folder(round_, "select") / "summary.json").get("barren", {}) for run in (before, now))
        names = [name for name in is_ if name not in was]
        if not names:
            continue
        table = read_table(now.folder(round_, "plan") / "prompts.parquet", ["prompt_id", "prompt"])
        texts = dict(zip(table.column("prompt_id").to_pylist(), table.column("prompt").to_pylist(), strict=True))
        yield from ({"round": round_, "prompt_id": n, "prompt": texts[n], "reason": is_[n]} for n in names)
