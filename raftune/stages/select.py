"""Stage `select`: a verdict for every sample."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from raftune.config.selection import SelectionConfig
from raftune.errors import RewardError
from raftune.protocols import Inputs
from raftune.records import VERDICT_SCHEMA, Status, content_hash, derive_seed
from raftune.selection import REASONS, Candidates, Verdicts, barren, select
from raftune.store.layout import unit_file, unit_numbers
from raftune.store.parquet import column_names, read_table, table_writer

_CHEAP = ("prompt_id", "k", "score", "status")


class Select:
    """verdicts.parquet, one row a sample, and summary.json: what was kept, and which prompts yielded nothing, and why."""

    name = writes = "select"

    def __init__(
        self,
        config: SelectionConfig,
        *,
        seed: int,
        round_: int,
        shards: tuple[str, ...] = ("draw",),
        max_failures: float = 1.0,
    ) -> None:
        self.config, self.seed, self.round, self.shards, self.max_failures = config, seed, round_, shards, max_failures
        self.regularised = ("logp", "logp-start") if config.beta > 0 else ()
        self.reads = ("plan", *shards, "score", *self.regularised)
        self.fields = ("selection", "seed", "rewards.max_failure_fraction")

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: Inputs, out: Path) -> None:
        units = unit_numbers(inputs["score"])
        refuse_failures(inputs, units, self.shards, self.max_failures)
        prompts = read_table(inputs["plan"] / "prompts.parquet", ["prompt_id"]).column("prompt_id").to_pylist()
        candidates, scores = self.candidates(inputs, units, prompts)
        verdicts = select(candidates, self.config, derive_seed("select", self.seed, self.round))
        write_verdicts(out / "verdicts.parquet", inputs["score"], units, candidates, scores, verdicts)
        summary = self.summary(candidates, scores, verdicts, prompts)
        (out / "summary.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n")

    def candidates(
        self, inputs: Inputs, units: list[int], prompts: Sequence[str]
    ) -> tuple[Candidates, npt.NDArray[np.float64]]:
        """The columns that a rule looks at, of all units; beside them the scores before any regularisation."""
        number = {name: i for i, name in enumerate(prompts)}
        parts: list[tuple[Any, ...]] = []
        for unit in units:
            score = read_table(inputs["score"] / unit_file(unit), _CHEAP)
            samples = [
                read_table(inputs[s] / unit_file(unit), [*self._length_columns(inputs[s], unit)]) for s in self.shards
            ]
            usable = pc.equal(score.column("status"), Status.OK.value)
            values = pc.if_else(usable, score.column("score"), None).to_numpy(zero_copy_only=False).astype(np.float64)
            ranked = values - self.config.beta * self.log_ratio(inputs, unit) if self.regularised else values
            groups = [number[name] for name in score.column("prompt_id").to_pylist()]
            lengths, hashes = zip(*(pair for s in samples for pair in _lengths(s)), strict=True)
            parts.append((groups, score.column("k").to_numpy(), ranked, lengths, hashes, values))
        columns = [np.concatenate([np.asarray(p[i]) for p in parts]) if parts else np.zeros(0) for i in range(6)]
        group, k, ranked, length, content, plain = columns
        return (
            Candidates(
                group=group.astype(np.int64),
                k=k.astype(np.int32),
                score=ranked.astype(np.float64),
                length=length.astype(np.int64),
                content=content.astype(np.uint64),
            ),
            plain.astype(np.float64),
        )

    def log_ratio(self, inputs: Inputs, unit: int) -> npt.NDArray[np.float64]:
        """log p - log p0 of each sample of the unit, nats."""
        ours, start = (
            read_table(inputs[n] / unit_file(unit), ["log_prob"]).column("log_prob").to_numpy()
            for n in self.regularised
        )
        return np.asarray(ours - start, dtype=np.float64)

    @staticmethod
    def _length_columns(folder: Path, unit: int) -> tuple[str, ...]:
        return (
            ("completion", "completion_ids")
            if "completion_ids" in column_names(folder / unit_file(unit))
            else ("completion",)
        )

    def summary(
        self, candidates: Candidates, scores: npt.NDArray[np.float64], verdicts: Verdicts, prompts: Sequence[str]
    ) -> dict[str, Any]:
        chosen = verdicts.weight > 0
        reasons = Counter(REASONS[code] for code in verdicts.reason.tolist())
        empty = {prompts[group]: words for group, words in barren(candidates, verdicts).items()}
        asked = set(candidates.group.tolist())
        empty |= {name: "its unit failed and was set aside" for i, name in enumerate(prompts) if i not in asked}
        return {
            "samples": len(scores),
            "kept": int(chosen.sum()),
            "prompts": len(prompts),
            "prompts_kept": len(np.unique(candidates.group[chosen])),
            "reward_drawn": _mean(scores),
            "reward_kept": _mean(scores[chosen]),
            "reward_std": float(np.nanstd(scores)) if np.isfinite(scores).any() else None,
            "reasons": dict(sorted(reasons.items())),
            "barren": dict(sorted(empty.items())),
        }


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def _lengths(samples: pa.Table) -> Iterator[tuple[int, int]]:
    """Each sample's length in the family's unit, and the hash of its content."""
    completions = samples.column("completion").to_pylist()
    if "completion_ids" in samples.column_names:
        lengths = pc.list_value_length(samples.column("completion_ids")).to_pylist()
    else:
        lengths = [len(c) if isinstance(c, str) else 1 for c in completions]
    yield from zip(lengths, map(content_hash, completions), strict=True)


def refuse_failures(inputs: Inputs, units: list[int], shards: tuple[str, ...], limit: float) -> None:
    """Raises RewardError, with examples, when more than this share of the samples could not be scored."""
    total, failed, examples = 0, Counter[str](), []
    for unit in units:
        table = read_table(inputs["score"] / unit_file(unit), ["sample_id", "status", "detail"])
        total += table.num_rows
        bad = table.filter(pc.is_in(table.column("status"), pa.array(["invalid", "error", "timeout"])))
        failed.update(bad.column("status").to_pylist())
        examples += [f"{r['sample_id']}: {r['detail']}" for r in bad.slice(0, max(0, 3 - len(examples))).to_pylist()]
    if total and sum(failed.values()) > limit * total:
        counts = ", ".join(f"{n} {status}" for status, n in sorted(failed.items()))
        raise RewardError(
            f"rewards: {sum(failed.values())} of {total} samples could not be scored ({counts}); "
            f"rewards.max_failure_fraction allows {limit:g}. For example: "
            + " | ".join(examples)
            + ". Mend the reward and run `raftune resume RUN --from score`."
        )


def write_verdicts(
    path: Path,
    score: Path,
    units: list[int],
    candidates: Candidates,
    scores: npt.NDArray[np.float64],
    verdicts: Verdicts,
) -> None:
    """Streams the verdicts unit by unit, so that memory does not grow with the words."""
    at = 0
    with table_writer(path, VERDICT_SCHEMA) as writer:
        for unit in units:
            who = read_table(score / unit_file(unit), ["sample_id", "prompt_id", "k", "source"])
            rows = slice(at, at + who.num_rows)
            at = rows.stop
            reason = pa.DictionaryArray.from_arrays(pa.array(verdicts.reason[rows].astype(np.int8)), pa.array(REASONS))
            values = {
                "score": pa.array(scores[rows], from_pandas=True),
                "ranked_by": pa.array(candidates.score[rows], from_pandas=True),
                "rank": pa.array(verdicts.rank[rows], pa.int32()),
                "weight": pa.array(verdicts.weight[rows], pa.float64()),
                "reason": reason,
            }
            columns = {**{name: who.column(name) for name in who.column_names}, **values}
            writer.write_table(pa.table(columns, schema=VERDICT_SCHEMA))
