"""Stage `score`: every part of every sample's score, with its status."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from raftune.protocols import Inputs, Panel
from raftune.records import scores_table
from raftune.stages.plan import asked
from raftune.store.layout import unit_file, unit_numbers
from raftune.store.parquet import read_metadata, read_table, write_table

METRICS = "metrics"  # in a shard's metadata: what rewards gave to log_metric, as JSON: {name: [mean, count]}


class ScoreSamples:
    """One shard a unit, row for row beside what was drawn (and what a teacher gave)."""

    def __init__(
        self,
        panel: Callable[[], Panel],
        *,
        plan: str = "plan",
        reads: tuple[str, ...] = ("draw",),
        writes: str = "score",
        fields: tuple[str, ...] = ("rewards.batch_size",),
        local: bool = False,
    ) -> None:
        self.panel, self.plan, self.shards, self.local = panel, plan, reads, local
        self.name = writes.replace("evaluate/", "evaluation ")
        self.writes = writes
        self.reads = (plan, *reads)
        self.fields = fields

    def fingerprints(self) -> Mapping[str, str]:
        return {"rewards": self.panel().fingerprint}

    def units(self, inputs: Inputs) -> list[int]:
        return unit_numbers(*(inputs[name] for name in self.shards))

    def run_unit(self, inputs: Inputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        panel = self.panel()
        samples = pa.concat_tables(read_shards([inputs[name] for name in self.shards], index))
        scores = panel.score_samples(asked(inputs[self.plan], index, samples), samples)
        extras = panel.extras
        logged = {name: [value, extras.counts[name]] for name, value in extras.metrics.items()}
        told = {METRICS: json.dumps(logged, sort_keys=True)} if logged else {}
        write_table(scores_table(samples, scores, panel.names, extras.columns), out, {**metadata, **told})
        return panel.notes()


def logged_metrics(folder: Path) -> dict[str, float]:
    """The mean of each metric that rewards logged, over all calls of a stage; what is not finite is left out."""
    sums: dict[str, tuple[float, int]] = {}
    for unit in unit_numbers(folder):
        _, metadata = read_metadata(folder / unit_file(unit))
        for name, (mean, count) in json.loads(metadata.get(METRICS, "{}")).items():
            total, number = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * count, number + count)
    means = {name: total / number for name, (total, number) in sorted(sums.items())}
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def read_shards(folders: list[Path], index: int) -> Iterator[pa.Table]:
    """The unit's table of each folder."""
    for folder in folders:
        yield read_table(folder / unit_file(index))
