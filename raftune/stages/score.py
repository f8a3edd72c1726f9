"""Stage `score`: scores every sample, with the parts and their status."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.errors import RunDamaged
from raftune.protocols import ChunkedStage, Scorer, StageInputs
from raftune.records import RewardPart, Score, ScoreStatus, extras_of, scores_table
from raftune.stages.plan import prompts_of_samples
from raftune.store.commit import has_changed, stage_of
from raftune.store.committed import check_file, committed
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import read_metadata, read_table, write_table

ONLY = "only.json"  # beside earlier scores: the statuses of the samples that are scored again
KEPT = "kept"  # in a chunk file's metadata: how many earlier scores were kept, as JSON
METRICS = "metrics"  # in a chunk file's metadata: what rewards gave to log_metric, as JSON: {name: [mean, count]}


class ScoreStage(ChunkedStage):
    """One file per chunk, row for row beside what was generated (and what a teacher gave)."""

    fields = ("rewards.batch_size",)

    def __init__(
        self,
        rewards: Callable[[], Scorer],
        *,
        plan: str = "plan",
        reads: tuple[str, ...] = ("generate",),
        writes: str = "score",
        local: bool = False,
        earlier: Path | None = None,
    ) -> None:
        """`earlier`: a folder of scores to keep, which may be missing; it is deleted once the stage is committed."""
        self.rewards, self.plan, self.shards, self.local, self.scratch = rewards, plan, reads, local, earlier
        self.name, self.writes = stage_of(writes), writes
        self.reads = (plan, *reads)

    def fingerprints(self) -> Mapping[str, str]:
        return {"rewards": self.rewards().fingerprint}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(*(inputs[name] for name in self.shards))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        rewards = self.rewards()
        samples = read_shards([inputs[name] for name in self.shards], index)
        kept, metrics, facts = _kept_scores(self.scratch, index, samples)
        earlier = {}
        for row_index, row in kept.items():
            parts = {n: RewardPart(row[f"rewards/{n}"], ScoreStatus(row[f"status/{n}"])) for n in rewards.names}
            earlier[row_index] = Score(row["score"], ScoreStatus(row["status"]), parts, row["detail"])
        scores = rewards.score_samples(prompts_of_samples(inputs[self.plan], index, samples), samples, earlier)
        extras = rewards.extras
        for name, mean in extras.metrics.items():
            count = extras.counts[name]
            before, number = metrics.get(name, (0.0, 0))
            total = number + count
            metrics[name] = [(before * number + mean * count) / total, total] if number else [mean, count]
        if metrics:
            facts[METRICS] = json.dumps(metrics, sort_keys=True)
        logged = {row_index: extras_of(row) for row_index, row in kept.items()}
        missing = [None] * samples.num_rows
        columns = {}
        for name in dict.fromkeys([*extras.columns, *(name for row in logged.values() for name in row)]):
            now = extras.columns.get(name, missing)
            columns[name] = [logged[i].get(name) if i in logged else now[i] for i in range(samples.num_rows)]
        write_table(scores_table(samples, scores, rewards.names, columns), out, {**metadata, **facts})
        return rewards.notes()


def _kept_scores(
    folder: Path | None, chunk: int, samples: pa.Table
) -> tuple[dict[int, dict[str, Any]], dict[str, list[Any]], dict[str, str]]:
    """The earlier rows of the samples that are not scored again, by their place; the metrics logged then; and what the
    new chunk file records of it. All empty where the stage keeps nothing."""
    commit = committed(folder) if folder is not None else None
    if folder is None or commit is None or chunk_file(chunk) not in commit.files:
        return {}, {}, {}
    path, only = check_file(folder / chunk_file(chunk)), read_only(folder)
    rows = {row["sample_id"]: row for row in read_table(path).to_pylist() if not statuses_in(row).intersection(only)}
    names = samples.column("sample_id").to_pylist()
    kept = {i: rows[name] for i, name in enumerate(names) if name in rows}
    facts = {"only": only, "asked": len(names) - len(kept), "kept": len(kept)}
    return kept, _metrics_in(path), {KEPT: json.dumps(facts, sort_keys=True)}


def _metrics_in(path: Path) -> dict[str, list[Any]]:
    metrics: dict[str, list[Any]] = json.loads(read_metadata(path)[1].get(METRICS, "{}"))
    return metrics


def read_only(folder: Path) -> list[str]:
    """The statuses of the samples that are scored again, beside earlier scores. Raises RunDamaged."""
    path = folder / ONLY
    content = json.loads(path.read_bytes())
    if has_changed(content, "only"):
        raise RunDamaged(f"{path} has changed since it was written. Resume the run with --from score.")
    return list(content["only"])


def statuses_in(row: Mapping[str, Any]) -> set[str]:
    """The statuses of the parts of a score, in its row of a chunk file."""
    return {value for name, value in row.items() if name.startswith("status/")}


def logged_metrics(folder: Path) -> dict[str, float]:
    """The mean of each metric that rewards logged, over all calls of a stage; what is not finite is left out."""
    sums: dict[str, tuple[float, int]] = {}
    for chunk in chunk_numbers(folder):
        for name, (mean, count) in _metrics_in(folder / chunk_file(chunk)).items():
            total, number = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * count, number + count)
    means = {name: total / number for name, (total, number) in sorted(sums.items())}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def read_shards(folders: Sequence[Path], index: int) -> pa.Table:
    """The chunk's samples in these folders, one after another."""
    return pa.concat_tables([read_table(folder / chunk_file(index)) for folder in folders])
