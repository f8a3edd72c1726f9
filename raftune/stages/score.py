"""Stage `score`: scores every sample, with the parts and their status."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.errors import RunDamaged
from raftune.protocols import Scorer, StageInputs
from raftune.records import RewardPart, Score, ScoreStatus, extras_of, scores_table
from raftune.stages.plan import asked
from raftune.store.commit import has_changed
from raftune.store.committed import check_file, committed
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import read_metadata, read_table, write_table

ONLY = "only.json"  # beside earlier scores: the statuses of the samples that are asked about again
KEPT = "kept"  # in a chunk file's metadata: of how many samples earlier scores were kept, as JSON
METRICS = "metrics"  # in a chunk file's metadata: what rewards gave to log_metric, as JSON: {name: [mean, count]}


class ScoreStage:
    """One file per chunk, row for row beside what was generated (and what a teacher gave)."""

    def __init__(
        self,
        panel: Callable[[], Scorer],
        *,
        plan: str = "plan",
        reads: tuple[str, ...] = ("generate",),
        writes: str = "score",
        fields: tuple[str, ...] = ("rewards.batch_size",),
        local: bool = False,
        earlier: Path | None = None,
    ) -> None:
        """`earlier`: a folder that may hold scores that are kept; it is removed once the stage is committed."""
        self.panel, self.plan, self.shards, self.local, self.scratch = panel, plan, reads, local, earlier
        self.name = writes.replace("evaluate/", "evaluation ")
        self.writes = writes
        self.reads = (plan, *reads)
        self.fields = fields

    def fingerprints(self) -> Mapping[str, str]:
        return {"rewards": self.panel().fingerprint}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(*(inputs[name] for name in self.shards))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        panel = self.panel()
        samples = pa.concat_tables(read_shards([inputs[name] for name in self.shards], index))
        kept, before, told = kept_scores(self.scratch, index, samples)
        earlier = {row: score_in(facts, panel.names) for row, facts in kept.items()}
        scores = panel.score_samples(asked(inputs[self.plan], index, samples), samples, earlier)
        extras = panel.extras
        logged = {name: [value, extras.counts[name]] for name, value in extras.metrics.items()}
        if logged := both(before, logged):
            told[METRICS] = json.dumps(logged, sort_keys=True)
        columns = with_kept(extras.columns, kept, samples.num_rows)
        write_table(scores_table(samples, scores, panel.names, columns), out, {**metadata, **told})
        return panel.notes()


def kept_scores(
    folder: Path | None, chunk: int, samples: pa.Table
) -> tuple[dict[int, dict[str, Any]], dict[str, list[Any]], dict[str, str]]:
    """Of the samples about which no reward is asked again the earlier rows, by their place; the metrics logged then;
    what the new chunk file says of it. All empty where the stage keeps nothing."""
    commit = committed(folder) if folder is not None else None
    if folder is None or commit is None or chunk_file(chunk) not in commit.files:
        return {}, {}, {}
    path, only = check_file(folder / chunk_file(chunk)), read_only(folder)
    rows = {row["sample_id"]: row for row in read_table(path).to_pylist() if not statuses_in(row).intersection(only)}
    names = samples.column("sample_id").to_pylist()
    kept = {place: rows[name] for place, name in enumerate(names) if name in rows}
    told = {"only": only, "asked": len(names) - len(kept), "kept": len(kept)}
    before = json.loads(read_metadata(path)[1].get(METRICS, "{}"))
    return kept, before, {KEPT: json.dumps(told, sort_keys=True)}


def read_only(folder: Path) -> list[str]:
    """The statuses of the samples that are asked about again, beside earlier scores. Raises RunDamaged."""
    path = folder / ONLY
    content = json.loads(path.read_bytes())
    if has_changed(content):
        raise RunDamaged(f"{path} has changed since it was written. Resume the run with --from score.")
    return list(content["only"])


def statuses_in(row: Mapping[str, Any]) -> set[str]:
    """The statuses of the parts of a score, in its row of a chunk file."""
    return {value for name, value in row.items() if name.startswith("status/")}


def score_in(row: Mapping[str, Any], names: tuple[str, ...]) -> Score:
    """The score in a row of a chunk file; what its parts say in words stands together in `detail`."""
    parts = {name: RewardPart(row[f"rewards/{name}"], ScoreStatus(row[f"status/{name}"])) for name in names}
    return Score(row["score"], ScoreStatus(row["status"]), parts, row["detail"])


def both(before: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The mean and count of each metric over the earlier calls and those of now."""
    found = {name: list(value) for name, value in before.items()}
    for name, (mean, count) in now.items():
        earlier, number = found.get(name, (0.0, 0))
        found[name] = (
            [(earlier * number + mean * count) / (number + count), number + count] if number else [mean, count]
        )
    return found


def with_kept(
    columns: Mapping[str, list[Any]], kept: Mapping[int, Mapping[str, Any]], count: int
) -> dict[str, list[Any]]:
    """The logged columns with what was logged of the samples whose scores are kept."""
    logged = {place: extras_of(row) for place, row in kept.items()}
    names = dict.fromkeys([*columns, *(name for extras in logged.values() for name in extras)])
    none = [None] * count
    return {
        name: [logged[i].get(name) if i in logged else columns.get(name, none)[i] for i in range(count)]
        for name in names
    }


def logged_metrics(folder: Path) -> dict[str, float]:
    """The mean of each metric that rewards logged, over all calls of a stage; what is not finite is left out."""
    sums: dict[str, tuple[float, int]] = {}
    for chunk in chunk_numbers(folder):
        _, metadata = read_metadata(folder / chunk_file(chunk))
        for name, (mean, count) in json.loads(metadata.get(METRICS, "{}")).items():
            total, number = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * count, number + count)
    means = {name: total / number for name, (total, number) in sorted(sums.items())}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def read_shards(folders: list[Path], index: int) -> Iterator[pa.Table]:
    """The chunk's table of each folder."""
    for folder in folders:
        yield read_table(folder / chunk_file(index))
