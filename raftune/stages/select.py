"""Stage `select`: gives every sample a verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import BoolArray, FloatArray, IntArray, UInt64Array
from raftune.config.selection import SelectionConfig
from raftune.errors import ModelError, RewardError
from raftune.protocols import SingleStage, StageInputs
from raftune.records import IDENTITY, INVALID, VERDICT_SCHEMA, ScoreStatus, content_hash, derive_seed
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
_SHOWN = 3  # reasons why samples could not be scored


class SelectStage(SingleStage):
    """verdicts.parquet, one row a sample, and summary.json: what was kept; which prompts have no kept samples, and why.

    With `num_generations` only so many of the policy's first samples of each prompt take part.
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

    def fingerprints(self) -> dict[str, str]:
        return rule_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> None:
        rule = load_rule(self.config)
        chunks = chunk_numbers(*(inputs[name] for name in ("score", *self.regularised)))
        self._check_failures(inputs, chunks)
        prompts = read_table(inputs["plan"] / "prompts.parquet", ["prompt_id"]).column("prompt_id").to_pylist()
        numbers = pa.array(prompts, pa.string())
        parts = [self._candidates(inputs, chunk, numbers) for chunk in chunks]
        types = (np.int64, np.int32, np.float64, np.int64, np.uint64, np.bool_, np.float64, np.float64)
        *columns, scores, cut = (
            np.concatenate([np.zeros(0, kind), *(part[i] for part in parts)]) for i, kind in enumerate(types)
        )
        candidates = Candidates(*columns)
        verdicts = select(candidates, self.config, derive_seed("select", self.seed, self.round), rule)
        self._write_verdicts(inputs, out / "verdicts.parquet", chunks, candidates, scores, cut, verdicts)
        dump_json(out / "summary.json", _summary(candidates, scores, cut, verdicts, prompts))

    def _scores(self, inputs: StageInputs, chunk: int, columns: Sequence[str]) -> tuple[pa.Table, IntArray]:
        """These columns of the chunk's scores, and which rows take part."""
        table = read_table(inputs["score"] / chunk_file(chunk), columns)
        if self.num_generations is None:
            return table, np.arange(table.num_rows)
        generated = pc.equal(table.column("source"), "policy").to_numpy(zero_copy_only=False)
        return table, np.flatnonzero(~generated | (table.column("k").to_numpy() < self.num_generations))

    def _invalid(self, inputs: StageInputs, chunk: int) -> BoolArray:
        """(N,) which samples of the chunk their policy calls invalid."""
        parts = []
        for path in (inputs[name] / chunk_file(chunk) for name in self.shards):
            if INVALID in column_names(path):
                parts.append(read_table(path, [INVALID]).column(INVALID).is_valid().to_numpy())
            else:
                parts.append(np.zeros(read_metadata(path)[0], np.bool_))
        return np.concatenate(parts)

    def _candidates(self, inputs: StageInputs, chunk: int, prompts: pa.Array) -> tuple[npt.NDArray[Any], ...]:
        """The columns of Candidates, of the samples of a chunk, then the scores before any regularisation, and which
        samples were cut off (1 where one reached the longest length, NaN where that is not known)."""
        table, rows = self._scores(inputs, chunk, ("prompt_id", "k", "source", "score", "status"))
        usable = pc.equal(table.column("status"), ScoreStatus.OK.value)
        scores = pc.if_else(usable, table.column("score"), None).to_numpy(zero_copy_only=False).astype(np.float64)
        ranked = scores
        if self.regularised:
            current, start = (inputs[name] / chunk_file(chunk) for name in self.regularised)
            ranked = scores - self.config.beta * log_ratio(current, start)
        group = pc.index_in(table.column("prompt_id"), value_set=prompts).to_numpy().astype(np.int64)
        paths = [inputs[name] / chunk_file(chunk) for name in self.shards]
        length, content = np.zeros(table.num_rows, np.int64), np.zeros(table.num_rows, np.uint64)
        if self.config.min_length is not None or self.config.max_length is not None:
            length = np.concatenate([lengths(path) for path in paths])
        if self.config.drop_duplicates:
            content = np.concatenate([contents(path) for path in paths])
        k, invalid = table.column("k").to_numpy(), self._invalid(inputs, chunk)
        cut = np.concatenate([clipped(path).to_numpy(zero_copy_only=False).astype(np.float64) for path in paths])
        return tuple(column[rows] for column in (group, k, ranked, length, content, invalid, scores, cut))

    def _check_failures(self, inputs: StageInputs, chunks: Sequence[int]) -> None:
        """Raises RewardError, with examples, when more than the allowed share of the samples could not be scored.

        Invalid samples, for which no reward was called, do not count; ModelError where there are no others.
        """
        total, failed, invalid = 0, Counter[str](), Counter[str]()
        examples: dict[str, str] = {}  # the first sample of each detail
        for chunk in chunks:
            table, rows = self._scores(inputs, chunk, ("sample_id", "k", "source", "status", "detail"))
            bad = pa.array(self._invalid(inputs, chunk)[rows])
            table = table.take(rows)
            invalid.update(table.filter(bad).column("detail").to_pylist())
            table = table.filter(pc.invert(bad))
            total += table.num_rows
            table = table.filter(pc.is_in(table.column("status"), pa.array(["invalid", "error", "timeout"])))
            failed.update(table.column("status").to_pylist())
            for name, why in zip(
                table.column("sample_id").to_pylist(), table.column("detail").to_pylist(), strict=True
            ):
                if len(examples) < _SHOWN:
                    examples.setdefault(why, name)
        if invalid and not total:
            reasons = ", ".join(f"{n} {why}" for why, n in invalid.most_common(3))
            raise ModelError(
                f"all {invalid.total()} samples of the round are invalid ({reasons}): there is nothing to learn from. "
                "Fix the policy or how it is generated, and run `raftune resume RUN --from generate`."
            )
        if total and failed.total() > self.max_failures * total:
            counts = ", ".join(f"{n} {status}" for status, n in sorted(failed.items()))
            shown = [f"{name}: {why}" for why, name in examples.items()]
            raise RewardError(
                f"rewards: {failed.total()} of {counted(total, 'sample')} could not be scored ({counts}); "
                f"rewards.max_failure_fraction allows {self.max_failures:g}. For example: {' | '.join(shown)}. {FIX} "
                f"`raftune resume RUN --from score --only {','.join(sorted(failed))}`, which scores these samples "
                "again."
            )

    def _write_verdicts(
        self,
        inputs: StageInputs,
        path: Path,
        chunks: list[int],
        candidates: Candidates,
        scores: FloatArray,
        cut: FloatArray,
        verdicts: Verdicts,
    ) -> None:
        """Streams the verdicts beside their samples, one row group a chunk, so that the ids are not all in memory."""
        schema = VERDICT_SCHEMA.with_metadata({UNITS: json.dumps(chunks)})
        # All words are written to the file: the one of invalid samples only where there are any.
        words: tuple[str, ...] = verdicts.words
        if words == REASONS and not (verdicts.reason == Reason.INVALID).any():
            words = REASONS[: Reason.INVALID]
        at = 0
        with table_writer(path, schema) as writer:
            for chunk in chunks:
                table, numbers = self._scores(inputs, chunk, IDENTITY)
                table = table.take(numbers)
                rows = slice(at, at + table.num_rows)
                at = rows.stop
                reason = verdicts.reason[rows].astype(np.int8)
                columns = {
                    **{name: table.column(name) for name in IDENTITY},
                    "score": pa.array(scores[rows], from_pandas=True),
                    "ranked_by": pa.array(candidates.score[rows], from_pandas=True),
                    "rank": pa.array(verdicts.rank[rows], pa.int32()),
                    "weight": pa.array(verdicts.weight[rows], pa.float64()),
                    "reason": pa.DictionaryArray.from_arrays(pa.array(reason), pa.array(words)),
                    "cut_off": pa.array(cut[rows], from_pandas=True).cast(pa.bool_()),
                }
                writer.write_table(pa.table(columns, schema=schema))


def _summary(
    candidates: Candidates, scores: FloatArray, cut: FloatArray, verdicts: Verdicts, prompts: Sequence[str]
) -> dict[str, Any]:
    kept = verdicts.weight > 0
    reasons = {verdicts.words[code]: int(n) for code, n in enumerate(np.bincount(verdicts.reason)) if n}
    empty = {prompts[group]: words for group, words in without_candidates(candidates, verdicts).items()}
    present = set(np.unique(candidates.group).tolist())
    empty |= {name: "its unit failed and was set aside" for i, name in enumerate(prompts) if i not in present}
    invalid = 0 if candidates.invalid is None else int(candidates.invalid.sum())
    return {
        "samples": len(scores),
        **({"invalid": invalid} if invalid else {}),
        "kept": int(kept.sum()),
        "prompts": len(prompts),
        "prompts_kept": len(np.unique(candidates.group[kept])),
        "nothing_to_rank": len(nothing_to_rank(candidates, verdicts)),
        "clipped_drawn": _mean(cut),
        "clipped_kept": _mean(cut[kept]),
        "reward_generated": _mean(scores),
        "reward_kept": _mean(scores[kept]),
        "reward_std": float(np.nanstd(scores)) if np.isfinite(scores).any() else None,
        "reasons": dict(sorted(reasons.items())),
        "empty_prompts": dict(sorted(empty.items())),
    }


def _mean(values: FloatArray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def log_ratio(path: Path, start: Path) -> FloatArray:
    """log p - log p0 of each sample of a chunk, nats, from the files of log-probabilities of both models."""
    logp, start_logp = (read_table(file, ["log_prob"]).column("log_prob").to_numpy() for file in (path, start))
    return np.asarray(logp - start_logp, dtype=np.float64)


def lengths(path: Path) -> IntArray:
    """Each sample's length in the family's unit: tokens, else characters of a text, else 1."""
    if "completion_ids" in column_names(path):
        counts = pc.list_value_length(read_table(path, ["completion_ids"]).column("completion_ids")).fill_null(0)
        return np.asarray(counts.to_numpy(), dtype=np.int64)
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


def read_verdicts(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Each selected chunk with its verdicts, row for row beside its samples."""
    _, metadata = read_metadata(path)
    yield from zip(json.loads(metadata[UNITS]), read_groups(path, columns), strict=True)
