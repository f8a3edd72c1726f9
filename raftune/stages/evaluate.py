"""Stages `evaluate` and `evaluation features`: metrics and image features of scored held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.data.images import LazyImages
from raftune.protocols import ChunkedStage, Metric, SingleStage, StageInputs
from raftune.records import IDENTITY, INVALID
from raftune.store.files import dump_json
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table, write_table

START = "evaluate/features@0"  # of the initial model's samples, which have the same prompts and seeds


class FeaturesStage(ChunkedStage):
    """One file per chunk, row for row beside the samples: `features`, null for a sample that is no image."""

    name = "evaluation features"
    writes = "evaluate/features"
    reads = ("evaluate/generate",)

    def __init__(self, extractor: Callable[[], Any]) -> None:
        """`extractor` loads a model with `fingerprint` and `image_features`: see rewards.builtin.clip.ClipModel."""
        self.extractor = extractor

    def fingerprints(self) -> Mapping[str, str]:
        return {"features": self.extractor().fingerprint}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(inputs["evaluate/generate"])

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        path = inputs["evaluate/generate"] / chunk_file(index)
        samples = read_table(path, [name for name in (*IDENTITY, "completion", INVALID) if name in column_names(path)])
        valid = samples.column("completion").is_valid()
        if INVALID in samples.column_names:
            valid = pc.and_(valid, samples.column(INVALID).is_null())
        images = samples.filter(valid)
        features = self.extractor().image_features(LazyImages(images.column("completion"), images.column("sample_id")))
        vectors = iter(features.tolist())
        rows = pa.array([next(vectors) if is_image else None for is_image in valid.to_pylist()], pa.list_(pa.float32()))
        write_table(samples.select(IDENTITY).append_column("features", rows), out, metadata)
        return ()


class EvaluateStage(SingleStage):
    """metrics.json: every metric that can be computed from the columns of the samples, or of the reference completions.

    The built-in metrics do not enter the key: a later version with more metrics leaves old rounds as they are.
    """

    name = writes = "evaluate"

    def __init__(
        self,
        metrics: Sequence[Metric],
        *,
        shards: tuple[str, ...],
        media: str,
        references: str | None = None,
        condense: Callable[[pa.Table], pa.Table] | None = None,
        load_own: Callable[[], Mapping[str, Metric]] | None = None,
        own_code: Mapping[str, str] | None = None,
        measured: Callable[[Metric, pa.Table], Any] | None = None,
    ) -> None:
        """`condense` replaces a chunk's completions by what metrics need of them, where all would be too large.

        `load_own` loads the user's own metrics, `own_code` are the hashes of their code, which enter the key, and
        `measured` computes the value of one.
        """
        self.metrics, self.media, self.references, self.condense = metrics, media, references, condense
        self.load_own, self.own_code, self.measured = load_own, own_code or {}, measured
        self.shards = tuple(f"evaluate/{name}" for name in shards)
        self.start = (START,) if "features" in shards else ()
        self.fields = ("evaluation.metrics",) if load_own else ()
        self.reads = (*self.shards, *([references] if references else []), *self.start)

    def fingerprints(self) -> Mapping[str, str]:
        return self.own_code

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        values: dict[str, Any] = {}
        custom = self.load_own() if self.load_own else {}
        errors: dict[str, str] = {}
        if chunk_numbers(inputs[self.shards[0]]):  # of fewer than ten prompts none is held out
            for table in self._tables(inputs):
                available = self._available(table)
                for metric in self.metrics:
                    if metric.needs <= available:
                        values |= metric(table)
                for name, metric in custom.items():
                    if f"metrics/{name}" not in values and frozenset(metric.needs) <= available:
                        assert self.measured is not None
                        values[f"metrics/{name}"] = None
                        try:
                            values[f"metrics/{name}"] = self.measured(metric, table)
                        except Exception as error:
                            errors[name] = f"{type(error).__name__}: {error}"
            for name, metric in custom.items():
                if f"metrics/{name}" not in values:
                    values[f"metrics/{name}"] = None
                    errors[name] = f"it needs {', '.join(sorted(metric.needs))}, which this evaluation does not have"
        errors = {name: errors[name] for name in custom if name in errors}
        if errors:
            values["metric_errors"] = errors
        dump_json(out / "metrics.json", plain(values), allow_nan=False)
        return tuple(f"evaluation.metrics: {name} has no value: {error}" for name, error in errors.items())

    def _tables(self, inputs: StageInputs) -> Iterator[pa.Table]:
        """The samples; and, where references are scored, a row for each held-out prompt."""
        yield self.samples(inputs)
        if self.references is not None and (chunks := chunk_numbers(inputs[self.references])):
            yield pa.concat_tables(read_table(inputs[self.references] / chunk_file(chunk)) for chunk in chunks)

    def samples(self, inputs: StageInputs) -> pa.Table:
        """One row a sample: its columns, its scores, `held_out/…` scores, and `log_prob`, `log_prob_start`.

        `features_start` are the features of the initial model's sample of the same prompt and seed.
        """
        tables, start, rows = [], None, {}
        if self.start and (chunks := chunk_numbers(inputs[START])):
            columns = ("prompt_id", "k", "features")
            start = pa.concat_tables(read_table(inputs[START] / chunk_file(chunk), columns) for chunk in chunks)
            rows = {key: row for row, key in enumerate(_keys(start))}
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
                numbers = pa.array([rows.get(key) for key in _keys(table)], pa.int64())
                table = table.append_column("features_start", start.column("features").take(numbers))
            tables.append(self.condense(table) if self.condense is not None else table)
        return pa.concat_tables(tables, promote_options="default")  # not every chunk has each logged column

    def _available(self, samples: pa.Table) -> frozenset[str]:
        """Which `needs` of a metric the table satisfies."""
        names = set(samples.column_names)
        has = {
            "scores": "score" in names,
            "log_probs": {"log_prob", "log_prob_start"} <= names,
            "own_log_probs": bool(names & {"log_prob", "completion_logprobs"}),
            "references": "reference_log_prob" in names,
            "text" if self.media in ("text", "messages") else self.media: "sample_id" in names,
            "features": "features" in names,
            INVALID: INVALID in names,
        }
        return frozenset(name for name, present in has.items() if present)


def _keys(samples: pa.Table) -> list[tuple[str, int]]:
    """What identifies a sample in every round: prompt and k, and so the seed."""
    return list(zip(samples.column("prompt_id").to_pylist(), samples.column("k").to_pylist(), strict=True))


def plain(value: Any) -> Any:
    """The value as JSON has it: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
