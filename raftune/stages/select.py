"""Stage `select`: gives every sample a verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import BoolArray, FloatArray, IntArray, UInt64Array
from raftune.config.selection import SelectionConfig
from raftune.errors import ModelError, RewardError
from raftune.protocols import StageInputs
from raftune.records import INVALID, VERDICT_SCHEMA, ScoreStatus, content_hash, derive_seed
from raftune.sanitize import counted
from raftune.selection import (
    REASONS,
    Candidates,
    Reason,
    Verdicts,
    load_rule,
    nothing_to_rank,
    rule_code,
    select,
    without_candidates,
)
from raftune.store.files import dump_json
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_groups, read_metadata, read_table, table_writer

UNITS = "raftune.units"
FIX = "Fix the reward and run"
SHOWN = 3  # reasons why samples could not be scored
_IDENTITY = ("sample_id", "prompt_id", "k", "source")
_CHEAP = ("prompt_id", "k", "source", "score", "status")
_FAILURE = ("sample_id", "k", "source", "status", "detail")


class SelectStage:
    """verdicts.parquet, one row a sample, and summary.json: what was kept; which prompts yielded nothing, and why.

    With `num_generations` only the policy's first so many samples of each prompt take part, as if no more had been
    generated.
    """

    name = writes = "select"

    def __init__(
        self,
        config: SelectionConfig,
        *,
        seed: int,
        round_: int,
        shards: tuple[str, ...] = ("generate",),
        max_failures: float = 1.0,
        num_generations: int | None = None,
    ) -> None:
        self.config, self.seed, self.round, self.shards, self.max_failures = config, seed, round_, shards, max_failures
        self.num_generations = num_generations
        self.regularised = ("logp", "logp-start") if config.beta > 0 else ()
        self.reads = ("plan", *shards, "score", *self.regularised)
        fewer = ("sampling.num_generations",) if num_generations is not None else ()
        self.fields = ("selection", "seed", "rewards.max_failure_fraction", *fewer)

    def fingerprints(self) -> Mapping[str, str]:
        return rule_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> None:
        rule = load_rule(self.config)
        chunks = chunk_numbers(*(inputs[name] for name in ("score", *self.regularised)))
        refuse_failures((self.judged(inputs, chunk) for chunk in chunks), self.max_failures)
        prompts = read_table(inputs["plan"] / "prompts.parquet", ["prompt_id"]).column("prompt_id").to_pylist()
        candidates, scores, cut = self.candidates(inputs, chunks, prompts)
        verdicts = select(candidates, self.config, derive_seed("select", self.seed, self.round), rule)
        who = (self.taking_part(inputs, chunk, _IDENTITY) for chunk in chunks)
        write_verdicts(out / "verdicts.parquet", chunks, who, candidates, scores, cut, verdicts)
        summary = self.summary(candidates, scores, cut, verdicts, prompts)
        dump_json(out / "summary.json", summary)

    def candidates(
        self, inputs: StageInputs, chunks: list[int], prompts: Sequence[str]
    ) -> tuple[Candidates, FloatArray, FloatArray]:
        """The columns that a rule looks at, of all chunks; the scores before any regularisation; and which were cut
        off.

        1 where a sample reached the longest length, NaN where that is not known.
        """
        number = pa.array(prompts, pa.string())
        parts = [self.chunk_candidates(inputs, chunk, number) for chunk in chunks]
        types = (np.int64, np.int32, np.float64, np.int64, np.uint64, np.float64, np.bool_, np.float64)
        group, k, ranked, length, content, plain, invalid, cut = (
            np.concatenate([np.zeros(0, kind), *(part[i] for part in parts)]) for i, kind in enumerate(types)
        )
        return Candidates(group=group, k=k, score=ranked, length=length, content=content, invalid=invalid), plain, cut

    def chunk_candidates(self, inputs: StageInputs, chunk: int, prompts: pa.Array) -> tuple[npt.NDArray[Any], ...]:
        """Of each sample of the chunk: prompt number, k, ranked score, length, content, score, invalid, clipped."""
        score = read_table(inputs["score"] / chunk_file(chunk), _CHEAP)
        rows = first_draws(score, self.num_generations)
        usable = pc.equal(score.column("status"), ScoreStatus.OK.value)
        values = pc.if_else(usable, score.column("score"), None).to_numpy(zero_copy_only=False).astype(np.float64)
        ranked = values - self.config.beta * self.log_ratio(inputs, chunk) if self.regularised else values
        group = pc.index_in(score.column("prompt_id"), value_set=prompts).to_numpy().astype(np.int64)
        paths = [inputs[name] / chunk_file(chunk) for name in self.shards]
        length, content = np.zeros(score.num_rows, np.int64), np.zeros(score.num_rows, np.uint64)
        if self.config.min_length is not None or self.config.max_length is not None:
            length = np.concatenate([lengths(path) for path in paths])
        if self.config.drop_duplicates:
            content = np.concatenate([contents(path) for path in paths])
        k, invalid = score.column("k").to_numpy(), self.invalid(inputs, chunk)
        cut = np.concatenate([clipped(path).to_numpy(zero_copy_only=False).astype(np.float64) for path in paths])
        return tuple(column[rows] for column in (group, k, ranked, length, content, values, invalid, cut))

    def invalid(self, inputs: StageInputs, chunk: int) -> BoolArray:
        """Which samples of the chunk their policy calls invalid."""
        return np.concatenate([invalid_of(inputs[name] / chunk_file(chunk)) for name in self.shards])

    def judged(self, inputs: StageInputs, chunk: int) -> pa.Table:
        """What is on record of how the samples that take part were scored, and which of them no reward was asked."""
        table = read_table(inputs["score"] / chunk_file(chunk), _FAILURE)
        table = table.append_column(INVALID, pa.array(self.invalid(inputs, chunk)))
        return table.take(first_draws(table, self.num_generations))

    def taking_part(self, inputs: StageInputs, chunk: int, columns: Sequence[str]) -> pa.Table:
        """These columns of the chunk's scores, of the samples that take part."""
        table = read_table(inputs["score"] / chunk_file(chunk), columns)
        return table if self.num_generations is None else table.take(first_draws(table, self.num_generations))

    def log_ratio(self, inputs: StageInputs, chunk: int) -> FloatArray:
        """log p - log p0 of each sample of the chunk, nats."""
        ours, start = (
            read_table(inputs[n] / chunk_file(chunk), ["log_prob"]).column("log_prob").to_numpy()
            for n in self.regularised
        )
        return np.asarray(ours - start, dtype=np.float64)

    def summary(
        self,
        candidates: Candidates,
        scores: FloatArray,
        cut: FloatArray,
        verdicts: Verdicts,
        prompts: Sequence[str],
    ) -> dict[str, Any]:
        chosen = verdicts.weight > 0
        reasons = {verdicts.words[code]: int(n) for code, n in enumerate(np.bincount(verdicts.reason)) if n}
        empty = {prompts[group]: words for group, words in without_candidates(candidates, verdicts).items()}
        asked = set(np.unique(candidates.group).tolist())
        empty |= {name: "its unit failed and was set aside" for i, name in enumerate(prompts) if i not in asked}
        invalid = 0 if candidates.invalid is None else int(candidates.invalid.sum())
        return {
            "samples": len(scores),
            **({"invalid": invalid} if invalid else {}),
            "kept": int(chosen.sum()),
            "prompts": len(prompts),
            "prompts_kept": len(np.unique(candidates.group[chosen])),
            "nothing_to_rank": len(nothing_to_rank(candidates, verdicts)),
            "clipped_drawn": _mean(cut),
            "clipped_kept": _mean(cut[chosen]),
            "reward_generated": _mean(scores),
            "reward_kept": _mean(scores[chosen]),
            "reward_std": float(np.nanstd(scores)) if np.isfinite(scores).any() else None,
            "reasons": dict(sorted(reasons.items())),
            "barren": dict(sorted(empty.items())),
        }


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def lengths(path: Path) -> IntArray:
    """Each sample's length in the family's unit: tokens, else characters of a text, else 1."""
    if "completion_ids" in column_names(path):
        found = pc.list_value_length(read_table(path, ["completion_ids"]).column("completion_ids")).fill_null(0)
        return np.asarray(found.to_numpy(), dtype=np.int64)
    completions = read_table(path, ["completion"]).column("completion")
    return np.array([len(c) if isinstance(c, str) else 1 for c in completions.to_pylist()], dtype=np.int64)


def clipped(path: Path) -> pa.Array:
    """Whether each sample was cut off by its longest length; null where that is not known."""
    if "finish" not in column_names(path):
        return pa.nulls(read_metadata(path)[0], pa.bool_())
    return pc.equal(read_table(path, ["finish"]).column("finish"), "length").combine_chunks()


def contents(path: Path) -> UInt64Array:
    """For each sample a hash, equal where completions are identical."""
    completions = read_table(path, ["completion"]).column("completion")
    return np.array([content_hash(c) for c in completions.to_pylist()], dtype=np.uint64)


def first_draws(samples: pa.Table, num_generations: int | None) -> IntArray:
    """The rows of each prompt's first so many samples by the policy (None: of all of them), and of all other
    answers.
    """
    if num_generations is None:
        return np.arange(samples.num_rows)
    drawn = pc.equal(samples.column("source"), "policy").to_numpy(zero_copy_only=False)
    return np.flatnonzero(~drawn | (samples.column("k").to_numpy() < num_generations))


def invalid_of(path: Path) -> BoolArray:
    """(N,) which samples of a chunk file their policy calls invalid; none where it has no such column."""
    if INVALID not in column_names(path):
        return np.zeros(read_metadata(path)[0], np.bool_)
    return np.asarray(read_table(path, [INVALID]).column(INVALID).is_valid().to_numpy(), np.bool_)


def refuse_failures(scores: Iterable[pa.Table], limit: float) -> None:
    """Raises RewardError, with examples, when more than this share of the samples could not be scored.

    Invalid ones, about which no reward was asked, do not count; ModelError where there are no others.
    """
    total, failed, invalid = 0, Counter[str](), Counter[str]()
    examples: dict[str, str] = {}  # of each detail the first sample: what fails together fails alike
    for table in scores:
        invalid.update(table.filter(table.column(INVALID)).column("detail").to_pylist())
        asked = table.filter(pc.invert(table.column(INVALID)))
        total += asked.num_rows
        bad = asked.filter(pc.is_in(asked.column("status"), pa.array(["invalid", "error", "timeout"])))
        failed.update(bad.column("status").to_pylist())
        for name, detail in zip(bad.column("sample_id").to_pylist(), bad.column("detail").to_pylist(), strict=True):
            if len(examples) < SHOWN:
                examples.setdefault(detail, name)
    if invalid and not total:
        whole = ", ".join(f"{n} {why}" for why, n in invalid.most_common(3))
        raise ModelError(
            f"all {invalid.total()} samples of the round are invalid ({whole}): there is nothing to learn from. Fix "
            "the policy or how it is generated, and run `raftune resume RUN --from generate`."
        )
    if total and sum(failed.values()) > limit * total:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(failed.items()))
        shown = [f"{name}: {detail}" for detail, name in examples.items()]
        raise RewardError(
            f"rewards: {sum(failed.values())} of {counted(total, 'sample')} could not be scored ({counts}); "
            f"rewards.max_failure_fraction allows {limit:g}. For example: " + " | ".join(shown) + f". {FIX} "
            f"`raftune resume RUN --from score --only {','.join(sorted(failed))}`, which scores these samples again."
        )


def write_verdicts(
    path: Path,
    chunks: list[int],
    samples: Iterable[pa.Table],
    candidates: Candidates,
    scores: FloatArray,
    cut: FloatArray,
    verdicts: Verdicts,
) -> None:
    """Streams the verdicts beside their samples, one row group a chunk, so that memory does not grow with the words."""
    at = 0
    schema = VERDICT_SCHEMA.with_metadata({UNITS: json.dumps(chunks)})
    # Every word lies in the file: one that only some families need stays out of the files of others.
    words: tuple[str, ...] = verdicts.words
    if words == REASONS and not (verdicts.reason == Reason.INVALID).any():
        words = REASONS[: Reason.INVALID]
    with table_writer(path, schema) as writer:
        for who in samples:
            rows = slice(at, at + who.num_rows)
            at = rows.stop
            reason = pa.DictionaryArray.from_arrays(pa.array(verdicts.reason[rows].astype(np.int8)), pa.array(words))
            values = {
                "score": pa.array(scores[rows], from_pandas=True),
                "ranked_by": pa.array(candidates.score[rows], from_pandas=True),
                "rank": pa.array(verdicts.rank[rows], pa.int32()),
                "weight": pa.array(verdicts.weight[rows], pa.float64()),
                "reason": reason,
                "cut_off": pa.array(cut[rows], from_pandas=True).cast(pa.bool_()),
            }
            columns = {**{name: who.column(name) for name in who.column_names}, **values}
            writer.write_table(pa.table(columns, schema=schema))


def read_verdicts(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Each chunk that was selected from, with its verdicts, row for row beside its samples."""
    _, metadata = read_metadata(path)
    yield from zip(json.loads(metadata[UNITS]), read_groups(path, columns), strict=True)
