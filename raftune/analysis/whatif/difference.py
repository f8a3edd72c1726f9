"""Compares two training sets over the same samples: overlap, differences and scores."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """One training set: its samples, its prompts, and its mean by each score, weighted as in training.

    `reward_now` is by the scores of the what-if; both are the same where nothing was scored anew.
    """

    samples: int
    prompts: int
    reward_before: float | None
    reward_now: float | None


@dataclass(frozen=True)
class SelectionChange:
    """How the training set of a round (None: of all) would have changed: counts of samples, and of prompts.

    changed: prompts of which other samples are kept, or with other weights. starved_before, empty_prompts: prompts
    without a kept sample, before and now.
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

    largest: the prompts with the largest margins among those that changed, as plain data with their completions;
    empty_prompts: prompts without a kept sample now that had one before, each with its reason.
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
    from_policy: BoolArray
    old: FloatArray
    new: FloatArray
    before: FloatArray
    now: FloatArray

    def per_prompt(self, values: Any) -> FloatArray:
        """(G,) sums over each prompt's samples."""
        return np.bincount(self.group, weights=values, minlength=len(self.prompts)).astype(np.float64)

    def margins(self) -> FloatArray:
        """(G,) mean score of what is kept now less that of what was kept before, by the score now.

        Where one of the two keeps nothing of a prompt, the mean of all its samples stands in.
        """
        usable = np.isfinite(self.new)
        value = np.where(usable, self.new, 0.0)
        with np.errstate(invalid="ignore"):
            every, now, before = (
                self.per_prompt(value * weight * usable) / self.per_prompt(weight * usable)
                for weight in (np.ones(len(value)), self.now, self.before)
            )
        gain = np.where(np.isnan(now), every, now) - np.where(np.isnan(before), every, before)
        return np.where(np.isnan(gain), 0.0, gain)


def compare(before: RunFolder, now: RunFolder, rounds: list[int], show: int) -> Difference:
    """The run's training sets of these rounds against the what-if's; `show` prompts with their completions."""
    rescored = any(before.folder(r, "score") != now.folder(r, "score") for r in rounds)
    counts = {round_: Counter[str]() for round_ in rounds}
    sums: dict[int, FloatArray] = {}  # by K: sums of best-of-k estimates over prompts, of the policy's samples alone
    estimated: Counter[int] = Counter()  # by K: prompts in these sums
    left_out = 0
    largest: list[tuple[float, int, ChunkVerdicts, int]] = []
    order = itertools.count()
    for pair in pairs(before, now, rounds):
        changed = pair.per_prompt(np.abs(pair.before - pair.now) > 1e-12) > 0
        for name, value in _counts(pair, changed).items():
            counts[pair.round][name] += value
        size = read_plan(now.folder(pair.round, "plan"))["num_generations"]
        rows = np.flatnonzero(pair.from_policy)
        rows = rows[np.lexsort((pair.k[rows], pair.group[rows]))]
        scores = pair.new[rows].reshape(-1, size)
        whole = np.isfinite(scores).all(axis=1)
        left_out += int((~whole).sum())
        estimated[size] += int(whole.sum())
        estimates = best_of_k_estimates(scores[whole], _ks_up_to(size)).sum(axis=0)
        sums[size] = sums.get(size, np.zeros(len(estimates))) + estimates
        margins = pair.margins()
        candidates = [(abs(margins[g]), -next(order), pair, g) for g in np.flatnonzero(changed).tolist()]
        largest = heapq.nlargest(show, [*largest, *candidates], key=lambda item: item[:2])
    total = Counter[str]()
    for part in counts.values():
        total.update(part)  # Counter's + would drop sums that are below 0
    names = (_reward_names(before, rounds[0]), _reward_names(now, rounds[0]))
    return Difference(
        names if names[0] != names[1] or not rescored else (f"{names[0]} (the run's)", f"{names[1]} (now)"),
        rescored,
        [_selection_change(round_, part) for round_, part in counts.items()],
        _selection_change(None, total),
        _best_of(sums, estimated, left_out),
        [_example(now, pair, g) for _, _, pair, g in largest],
        list(itertools.islice(_newly_empty(before, now, rounds), show)),
    )


def pairs(before: RunFolder, now: RunFolder, rounds: list[int]) -> Iterator[ChunkVerdicts]:
    """Every chunk that the run selected from, with both scores and both weights; what took no part now has weight 0."""

    def floats(column: pa.ChunkedArray) -> FloatArray:
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)

    for round_ in rounds:
        verdicts = dict(read_verdicts(now.folder(round_, "select") / "verdicts.parquet", ["sample_id", "weight"]))
        columns = ["sample_id", "prompt_id", "k", "source", "score", "weight"]
        for chunk, old in read_verdicts(before.folder(round_, "select") / "verdicts.parquet", columns):
            codes = old.column("prompt_id").combine_chunks().dictionary_encode()
            new, weight = np.full(old.num_rows, np.nan), np.zeros(old.num_rows)
            path = now.folder(round_, "score") / chunk_file(chunk)
            if path.is_file():
                table = read_table(path, ["score", "status"])
                new = floats(pc.if_else(pc.equal(table.column("status"), "ok"), table.column("score"), None))
            if (selected := verdicts.get(chunk)) is not None:
                rows = pc.index_in(selected.column("sample_id"), value_set=old.column("sample_id").combine_chunks())
                weight[rows.to_numpy()] = selected.column("weight").to_numpy()
            yield ChunkVerdicts(
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


def _counts(pair: ChunkVerdicts, changed: BoolArray) -> dict[str, Any]:
    """Sums over the chunk, from which `_selection_change` computes."""
    was, is_ = pair.before > 0, pair.now > 0
    sums: dict[str, Any] = {
        "prompts": len(pair.prompts),
        "changed": changed.sum(),
        "in_both": (was & is_).sum(),
        "only_before": (was & ~is_).sum(),
        "only_now": (is_ & ~was).sum(),
    }
    for when, weight in (("before", pair.before), ("now", pair.now)):
        sums[f"{when} samples"] = (weight > 0).sum()
        sums[f"{when} prompts"] = (pair.per_prompt(weight > 0) > 0).sum()
        for by, values in (("old", pair.old), ("new", pair.new)):
            usable = np.isfinite(values)
            sums[f"{when} {by}"] = (weight[usable] * values[usable]).sum()
            sums[f"{when} {by} weight"] = weight[usable].sum()
    return sums


def _selection_change(round_: int | None, counts: Counter[str]) -> SelectionChange:
    kept = []
    for when in ("before", "now"):
        weights = [counts[f"{when} {by} weight"] for by in ("old", "new")]
        totals = [counts[f"{when} {by}"] for by in ("old", "new")]
        old, new = (float(sum_ / weight) if weight else None for sum_, weight in zip(totals, weights, strict=True))
        kept.append(KeptSamples(int(counts[f"{when} samples"]), int(counts[f"{when} prompts"]), old, new))
    before, now = kept
    names = ("prompts", "changed", "in_both", "only_before", "only_now")
    prompts, changed, both, gone, added = (int(counts[name]) for name in names)
    empty = (prompts - before.prompts, prompts - now.prompts)
    return SelectionChange(round_, prompts, changed, both, gone, added, *empty, before, now)


def _best_of(sums: dict[int, FloatArray], prompts: Counter[int], left_out: int) -> BestOfEstimate:
    """The curve over the prompts with the most samples, should rounds differ in K."""
    size = max((k for k, count in prompts.items() if count), default=0)
    if not size:
        return BestOfEstimate(0, left_out, {}, {})
    rewards = dict(zip(_ks_up_to(size), (sums[size] / prompts[size]).tolist(), strict=True))
    gain = rewards[size] - rewards[1]
    shares = {k: (value - rewards[1]) / gain for k, value in rewards.items() if k > 1 and gain > 0}
    return BestOfEstimate(prompts[size], left_out, rewards, shares)


def _ks_up_to(most: int) -> list[int]:
    """1, 2, 4, … and the most."""
    return sorted({*(2**i for i in range(most.bit_length())), most})


def _reward_names(run: RunFolder, round_: int) -> str:
    folder = run.folder(round_, "score")
    columns = column_names(folder / chunk_file(chunk_numbers(folder)[0])) if chunk_numbers(folder) else []
    return " + ".join(name.removeprefix("rewards/") for name in columns if name.startswith("rewards/"))


def _example(run: RunFolder, pair: ChunkVerdicts, group: int) -> dict[str, Any]:
    """One prompt with the completions that either keeps: scores, weights, texts."""
    name = pair.prompts[group]
    shards = [run.folder(pair.round, shard) / chunk_file(pair.chunk) for shard in ("generate", "teach")]
    rows = [row for path in shards if path.is_file() for row in read_drawn(path).to_pylist()]
    by_k = {row["k"]: row for row in rows if row["prompt_id"] == name}
    samples = []
    for i in np.flatnonzero((pair.group == group) & ((pair.before > 0) | (pair.now > 0))):
        row = by_k[int(pair.k[i])]
        before, now = (float(value) if np.isfinite(value) else None for value in (pair.old[i], pair.new[i]))
        samples.append(
            {
                **{key: row[key] for key in ("sample_id", "k", "source")},
                "completion": readable(row["completion"]),
                "score_before": before,
                "score_now": now,
                "weight_before": float(pair.before[i]),
                "weight_now": float(pair.now[i]),
            }
        )
    return {
        "round": pair.round,
        "prompt_id": name,
        "prompt": prompts_of(run.folder(pair.round, "plan"), pair.chunk)[name],
        "margin": float(pair.margins()[group]),
        "samples": samples,
    }


def _newly_empty(before: RunFolder, now: RunFolder, rounds: list[int]) -> Iterator[dict[str, Any]]:
    """The prompts without a kept sample now that had one before, with the reason."""
    for round_ in rounds:
        old, new = (read_json(run.folder(round_, "select") / "summary.json").get("barren", {}) for run in (before, now))
        names = [name for name in new if name not in old]
        if not names:
            continue
        table = read_table(now.folder(round_, "plan") / "prompts.parquet", ["prompt_id", "prompt"])
        texts = dict(zip(table.column("prompt_id").to_pylist(), table.column("prompt").to_pylist(), strict=True))
        yield from ({"round": round_, "prompt_id": n, "prompt": texts[n], "reason": new[n]} for n in names)
