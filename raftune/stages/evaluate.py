"""Stage `evaluate`: computes the metrics of a round's policy from scored held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.protocols import Metric, StageInputs
from raftune.records import INVALID
from raftune.stages.features import features_of
from raftune.store.files import dump_json
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import read_table

START = "evaluate/features@0"  # of the start's samples, which have the same prompts and seeds
IDENTITY = frozenset({"sample_id", "prompt_id", "k", "source"})  # the columns that every chunk file repeats


@dataclass(frozen=True)
class OwnMetrics:
    """The user's own metrics: loaded when the stage runs, the hashes of their code, and what makes one a value."""

    load: Callable[[], Mapping[str, Metric]]
    code: Mapping[str, str]
    measured: Callable[[Metric, pa.Table], Any]


class EvaluateStage:
    """metrics.json: every metric that the columns at hand suffice for, those of samples and those of reference answers.

    Which metrics there are does not enter the key: a later version that measures more leaves old rounds as they are.
    """

    name = "evaluate"
    writes = "evaluate"

    def __init__(
        self,
        metrics: Sequence[Metric],
        *,
        shards: tuple[str, ...],
        media: str,
        references: str | None = None,
        condense: Callable[[pa.Table], pa.Table] | None = None,
        own: OwnMetrics | None = None,
    ) -> None:
        """`own` are the user's own metrics, which do enter the key. `condense` puts what metrics need of a chunk's
        samples in place of what is too large to be held of all."""
        self.metrics, self.media, self.references, self.condense = metrics, media, references, condense
        self.shards = tuple(f"evaluate/{name}" for name in shards)
        self.start = (START,) if "features" in shards else ()
        self.own = own
        self.fields: tuple[str, ...] = ("evaluation.metrics",) if own else ()
        self.reads = (*self.shards, *([references] if references else []), *self.start)

    def fingerprints(self) -> Mapping[str, str]:
        return self.own.code if self.own else {}

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        found: dict[str, Any] = {}
        errors = dict.fromkeys(own := self.own.load() if self.own else {}, "")
        if chunk_numbers(inputs[self.shards[0]]):  # of fewer than ten prompts none is held out
            for table in self.tables(inputs):
                for metric in self.metrics:
                    if metric.needs <= self.has(table):
                        found |= metric(table)
                for name, metric in own.items():
                    if f"metrics/{name}" not in found and frozenset(metric.needs) <= self.has(table):
                        found[f"metrics/{name}"], errors[name] = self.measured(metric, table)
            for name, metric in own.items():
                if f"metrics/{name}" not in found:
                    found[f"metrics/{name}"] = None
                    errors[name] = f"it needs {', '.join(sorted(metric.needs))}, which this evaluation does not have"
        if failed := {name: error for name, error in errors.items() if error}:
            found["metric_errors"] = failed
        dump_json(out / "metrics.json", plain(found), allow_nan=False)
        return tuple(f"evaluation.metrics: {name} has no value: {error}" for name, error in failed.items())

    def measured(self, metric: Metric, table: pa.Table) -> tuple[Any, str]:
        """The value of a custom metric, and why it has none."""
        assert self.own is not None
        try:
            return self.own.measured(metric, table), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"

    def tables(self, inputs: StageInputs) -> Iterator[pa.Table]:
        """The samples; and where references are scored, these, a row for each held-out prompt."""
        yield self.samples(inputs)
        if self.references is not None and (chunks := chunk_numbers(inputs[self.references])):
            yield pa.concat_tables(read_table(inputs[self.references] / chunk_file(chunk)) for chunk in chunks)

    def samples(self, inputs: StageInputs) -> pa.Table:
        """One row a sample: what was generated, its scores, `held_out/…` scores, and `log_prob`, `log_prob_start`.

        Where there are `features`, `features_start` are those of the start's sample of the same prompt and seed.
        """
        tables = []
        start = features_of(inputs[START]) if self.start else None
        for chunk in chunk_numbers(*(inputs[name] for name in self.shards)):
            table = read_table(inputs[self.shards[0]] / chunk_file(chunk))
            for shard in self.shards[1:]:
                other = read_table(inputs[shard] / chunk_file(chunk))
                prefix = "held_out/" if shard.endswith("judge") else ""
                suffix = "_start" if shard.endswith("-start") else ""
                for name in other.column_names:
                    if name not in IDENTITY:
                        table = table.append_column(f"{prefix}{name}{suffix}", other.column(name))
            if start is not None:
                table = table.append_column("features_start", start.of(table))
            tables.append(self.condense(table) if self.condense is not None else table)
        return pa.concat_tables(tables, promote_options="default")  # not every chunk has each logged column

    def has(self, samples: pa.Table) -> frozenset[str]:
        names = set(samples.column_names)
        found = {"scores"} if "score" in names else set()
        found |= {"log_probs"} if {"log_prob", "log_prob_start"} <= names else set()
        found |= {"own_log_probs"} if names & {"log_prob", "completion_logprobs"} else set()
        found |= {"references"} if "reference_log_prob" in names else set()
        found |= {"text" if self.media in ("text", "messages") else self.media} if "sample_id" in names else set()
        found |= names & {"features", INVALID}
        return frozenset(found)


def plain(value: Any) -> Any:
    """The value as JSON holds it: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
