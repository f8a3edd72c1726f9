"""Compares two training sets over the same samples: overlap, differences and scores."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raftune.arrays import BoolArray, FloatArray, IntArray
from raftune.evaluation.bootstrap import best_of_k_estimates, ks_up_to, numbers_of, usable
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

    changed: prompts of which other samples are kept, or with other weights. empty_before, empty_prompts: prompts
    without a kept sample, before and now.
    """

    round: int | None
    prompts: int
    changed: int
    in_both: int
    only_before: int
    only_now: int
    empty_before: int
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
class RoundsVerdicts:
    """The samples of several rounds, row for row: (N,) scores and weights before and now.

    `prompts` holds round, chunk and id of each prompt; `group` is a sample's index in it.
    """

    prompts: list[tuple[int, int, str]]
    round: IntArray
    group: IntArray
    k: IntArray
    from_policy: BoolArray
    old: FloatArray
    new: FloatArray
    before: FloatArray
    now: FloatArray


def compare(before: RunFolder, now: RunFolder, rounds: list[int], show: int) -> Difference:
    """The run's training sets of these rounds against the what-if's; `show` prompts with their completions."""
    verdicts = read_both(before, now, rounds)
    margins = margins_of(verdicts)
    changed = np.unique(verdicts.group[np.abs(verdicts.before - verdicts.now) > 1e-12])
    largest = changed[np.argsort(-np.abs(margins[changed]), kind="stable")][:show]
    rescored = any(before.folder(r, "score") != now.folder(r, "score") for r in rounds)
    names = (_reward_names(before, rounds[0]), _reward_names(now, rounds[0]))
    return Difference(
        names if names[0] != names[1] or not rescored else (f"{names[0]} (the run's)", f"{names[1]} (now)"),
        rescored,
        [_selection_change(verdicts, round_) for round_ in rounds],
        _selection_change(verdicts, None),
        _best_of(verdicts, {r: read_plan(now.folder(r, "plan"))["num_generations"] for r in rounds}),
        [_example(now, verdicts, group, float(margins[group])) for group in largest.tolist()],
        list(itertools.islice(_newly_empty(before, now, rounds), show)),
    )


def read_both(before: RunFolder, now: RunFolder, rounds: list[int]) -> RoundsVerdicts:
    """Every sample that the run selected from, with both scores and weights; what took no part now has weight 0."""
    prompts: list[tuple[int, int, str]] = []
    parts: list[tuple[Any, ...]] = []
    for round_ in rounds:
        selected = dict(read_verdicts(now.folder(round_, "select") / "verdicts.parquet", ["sample_id", "weight"]))
        columns = ["sample_id", "prompt_id", "k", "source", "score", "weight"]
        for chunk, old in read_verdicts(before.folder(round_, "select") / "verdicts.parquet", columns):
            codes = old.column("prompt_id").combine_chunks().dictionary_encode()
            new, weight = np.full(old.num_rows, np.nan), np.zeros(old.num_rows)
            path = now.folder(round_, "score") / chunk_file(chunk)
            if path.is_file():
                new = usable(read_table(path, ["score", "status"]), "score", "status")
            if (table := selected.get(chunk)) is not None:
                rows = pc.index_in(table.column("sample_id"), value_set=old.column("sample_id").combine_chunks())
                weight[rows.to_numpy()] = table.column("weight").to_numpy()
            group = codes.indices.to_numpy().astype(np.int64) + len(prompts)
            k, policy = old.column("k").to_numpy(), pc.equal(old.column("source"), "policy").to_numpy()
            scores, weights = (numbers_of(old, "score"), new), (old.column("weight").to_numpy(), weight)
            parts.append((np.full(old.num_rows, round_), group, k, policy, *scores, *weights))
            prompts += [(round_, chunk, name) for name in codes.dictionary.to_pylist()]
    return RoundsVerdicts(prompts, *map(np.concatenate, zip(*parts, strict=True)))


def margins_of(verdicts: RoundsVerdicts) -> FloatArray:
    """(G,) mean score of what is kept now less that of what was kept before, by the score now.

    Where one of the two keeps nothing of a prompt, the mean of all its samples stands in.
    """
    usable = np.isfinite(verdicts.new)
    group, scores = verdicts.group[usable], verdicts.new[usable]

    def means(weights: FloatArray) -> FloatArray:
        sums = (np.bincount(group, weights=w, minlength=len(verdicts.prompts)) for w in (scores * weights, weights))
        with np.errstate(invalid="ignore"):
            return np.asarray(np.divide(*sums))

    every = means(np.ones(len(scores)))
    before, now = (means(weights[usable]) for weights in (verdicts.before, verdicts.now))
    gain = np.where(np.isnan(now), every, now) - np.where(np.isnan(before), every, before)
    return np.asarray(np.nan_to_num(gain))


def _selection_change(verdicts: RoundsVerdicts, round_: int | None) -> SelectionChange:
    rows = np.full(len(verdicts.group), True) if round_ is None else verdicts.round == round_
    group, before, now = verdicts.group[rows], verdicts.before[rows], verdicts.now[rows]

    def kept(weights: FloatArray) -> KeptSamples:
        means = []
        for scores in (verdicts.old[rows], verdicts.new[rows]):
            usable = np.isfinite(scores)
            total = weights[usable].sum()
            means.append(float((weights[usable] * scores[usable]).sum() / total) if total else None)
        return KeptSamples(int((weights > 0).sum()), len(np.unique(group[weights > 0])), *means)

    was_kept, is_kept = before > 0, now > 0
    prompts, kept_before, kept_now = len(np.unique(group)), kept(before), kept(now)
    return SelectionChange(
        round_,
        prompts,
        changed=len(np.unique(group[np.abs(before - now) > 1e-12])),
        in_both=int((was_kept & is_kept).sum()),
        only_before=int((was_kept & ~is_kept).sum()),
        only_now=int((is_kept & ~was_kept).sum()),
        empty_before=prompts - kept_before.prompts,
        empty_prompts=prompts - kept_now.prompts,
        before=kept_before,
        now=kept_now,
    )


def _best_of(verdicts: RoundsVerdicts, sizes: dict[int, int]) -> BestOfEstimate:
    """The curve of the policy's samples, over the prompts with the most of them, should rounds differ in K."""
    complete: defaultdict[int, list[FloatArray]] = defaultdict(list)  # by K: (P, K) scores of prompts
    left_out = 0
    for round_, size in sizes.items():
        rows = np.flatnonzero(verdicts.from_policy & (verdicts.round == round_))
        rows = rows[np.lexsort((verdicts.k[rows], verdicts.group[rows]))]
        scores = verdicts.new[rows].reshape(-1, size)
        finite = np.isfinite(scores).all(axis=1)
        left_out += int((~finite).sum())
        if finite.any():
            complete[size].append(scores[finite])
    if not complete:
        return BestOfEstimate(0, left_out, {}, {})
    size = max(complete)
    scores, ks = np.concatenate(complete[size]), ks_up_to(size)
    rewards = dict(zip(ks, best_of_k_estimates(scores, ks).mean(axis=0).tolist(), strict=True))
    gain = rewards[size] - rewards[1]
    shares = {k: (value - rewards[1]) / gain for k, value in rewards.items() if k > 1 and gain > 0}
    return BestOfEstimate(len(scores), left_out, rewards, shares)


def _reward_names(run: RunFolder, round_: int) -> str:
    folder = run.folder(round_, "score")
    columns = column_names(folder / chunk_file(chunk_numbers(folder)[0])) if chunk_numbers(folder) else []
    return " + ".join(name.removeprefix("rewards/") for name in columns if name.startswith("rewards/"))


def _example(run: RunFolder, verdicts: RoundsVerdicts, group: int, margin: float) -> dict[str, Any]:
    """One prompt with the completions that either keeps: scores, weights, texts."""
    round_, chunk, prompt_id = verdicts.prompts[group]
    paths = [run.folder(round_, shard) / chunk_file(chunk) for shard in ("generate", "teach")]
    rows = [row for path in paths if path.is_file() for row in read_drawn(path).to_pylist()]
    by_k = {row["k"]: row for row in rows if row["prompt_id"] == prompt_id}
    samples = []
    for i in np.flatnonzero((verdicts.group == group) & ((verdicts.before > 0) | (verdicts.now > 0))):
        row = by_k[int(verdicts.k[i])]
        scores = [float(value) if np.isfinite(value) else None for value in (verdicts.old[i], verdicts.new[i])]
        samples.append(
            {
                **{key: row[key] for key in ("sample_id", "k", "source")},
                "completion": readable(row["completion"]),
                "score_before": scores[0],
                "score_now": scores[1],
                "weight_before": float(verdicts.before[i]),
                "weight_now": float(verdicts.now[i]),
            }
        )
    prompt = prompts_of(run.folder(round_, "plan"), chunk)[prompt_id]
    return {"round": round_, "prompt_id": prompt_id, "prompt": prompt, "margin": margin, "samples": samples}


def _newly_empty(before: RunFolder, now: RunFolder, rounds: list[int]) -> Iterator[dict[str, Any]]:
    """The prompts without a kept sample now that had one before, with the reason."""
    for round_ in rounds:
        old, new = (
            read_json(run.folder(round_, "select") / "summary.json").get("empty_prompts", {}) for run in (before, now)
        )
        names = [name for name in new if name not in old]
        if not names:
            continue
        table = read_table(now.folder(round_, "plan") / "prompts.parquet", ["prompt_id", "prompt"])
        texts = dict(zip(table.column("prompt_id").to_pylist(), table.column("prompt").to_pylist(), strict=True))
        yield from ({"round": round_, "prompt_id": n, "prompt": texts[n], "reason": new[n]} for n in names)
