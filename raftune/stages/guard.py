"""Stage `guard`: compares generated with kept samples, and raises alarms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import BoolArray, IntArray
from raftune.config.guards import thresholds
from raftune.protocols import MonitorInput, SingleStage, StageInputs
from raftune.records import INVALID
from raftune.stages.evaluate import plain
from raftune.stages.select import clipped, contents, lengths, log_ratio, read_verdicts
from raftune.store.committed import read_json
from raftune.store.files import json_bytes
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table

_VERDICT = ("sample_id", "prompt_id", "k", "source", "score", "weight")
_SCORE = ("sample_id", "prompt_id", "k", "score")


class GuardStage(SingleStage):
    """metrics.json, of what was generated and of what was selected, and alarms.json: evidence, with examples."""

    name = writes = "guard"
    grows = True

    def __init__(
        self,
        monitor: Any,
        factors: Callable[[], Mapping[str, float]],
        *,
        round_: int,
        shards: tuple[str, ...],
        judged: tuple[str, ...] = (),
        judge: str = "",
        texts: bool = True,
        condense: Callable[[pa.Table], pa.Table] | None = None,
        counts: Callable[[pa.Table], pa.Table] = lambda samples: samples,
    ) -> None:
        """monitor: computes measures and alarms, see evaluation.examine.RoundMonitor. factors: the rewards' weights.

        judged: folders of the held-out samples besides their scores: "generate", "judge", "logp" and "logp-start".
        judge: the held-out reward in words, empty without one. condense: replaces completions that are too large to
        hold all of them by what is measured of them. counts: adds what each reward counts in the score, where that is
        not its value.
        """
        self.monitor, self.factors, self.round = monitor, factors, round_
        self.shards, self.judged, self.judge, self.texts = shards, judged, judge, texts
        self.condense, self.counts = condense, counts
        self.fields = thresholds(pictures=condense is not None)
        now = tuple(f"evaluate/{name}" for name in ("score", *judged)) if judged else ()
        earlier = [f"evaluate/{name}@{r}" for r in range(round_) for name in ("score", "judge")] if judge else []
        self.reads = (*shards, "score", "select", "model", *now, *earlier, *(["guard@1"] if round_ > 1 else []))

    def run(self, inputs: StageInputs, out: Path) -> None:
        verdicts = read_verdicts(inputs["select"] / "verdicts.parquet", _VERDICT)
        training = read_json(inputs["model"] / "training.json")
        evidence = MonitorInput(
            round=self.round,
            samples=self.counts(pa.concat_tables(self._samples(inputs, chunk, table) for chunk, table in verdicts)),
            factors=self.factors(),
            held_out=_held_out(inputs, self.judged, texts=self.texts) if self.judged else None,
            earlier=[_held_out(inputs, ("judge",), r) for r in range(self.round)] if self.judge else [],
            judge=self.judge,
            first=read_json(inputs["guard@1"] / "metrics.json")["generated"] if self.round > 1 else None,
            losses=training["losses"],
            mismatch=training["details"].get("mismatch", {}),
        )
        measures = self.monitor.measures(evidence)
        (out / "metrics.json").write_bytes(json_bytes(plain(measures)))
        (out / "alarms.json").write_bytes(json_bytes(plain(self.monitor.alarms(evidence, measures))))

    def _samples(self, inputs: StageInputs, chunk: int, table: pa.Table) -> pa.Table:
        """A chunk's verdicts with the rewards and what is known of the completions: numbers of all, texts of few."""
        scores = read_table(inputs["score"] / chunk_file(chunk))
        table = _beside(table, scores.select([name for name in scores.column_names if name.startswith("rewards/")]))
        paths = [inputs[name] / chunk_file(chunk) for name in self.shards]
        if self.condense is None and not self.texts:
            return table
        generated = pc.equal(table.column("source"), "policy").to_numpy(zero_copy_only=False)
        kept = table.column("weight").to_numpy() > 0
        ids = table.column("prompt_id")
        groups = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy(zero_copy_only=False).astype(np.int64)
        control = _first_of_each(groups, generated, np.bincount(groups, weights=kept).astype(np.int64))
        if self.condense is not None:
            names = [[n for n in ("sample_id", "completion", INVALID) if n in column_names(path)] for path in paths]
            samples = pa.concat_tables([read_table(path, n) for path, n in zip(paths, names, strict=True)])
            table = _beside(table, self.condense(samples))
            table = _beside(table, pa.concat_tables([_facts_of(path, texts=False) for path in paths]))
            return table.append_column("control", pa.array(control))
        texts = pa.concat_tables([read_table(path, ["completion"]) for path in paths]).column("completion")
        texts = pc.fill_null(texts, "")  # an invalid sample may have none
        similar = self.monitor.similarities(texts.filter(pa.array(generated)).to_pylist(), groups[generated])
        table = _beside(table, pa.concat_tables([_facts_of(path, texts=True) for path in paths]))
        columns = {
            "similarity": pa.array(np.append(similar, np.nan)[np.minimum(groups, len(similar))], from_pandas=True),
            "control": pa.array(control),
            "text": pc.if_else(pa.array(kept | control), texts, pa.scalar(None, texts.type)),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table


def _first_of_each(groups: IntArray, generated: BoolArray, counts: IntArray) -> BoolArray:
    """(N,) the control: of each prompt its first counts[prompt] generated samples, whatever they scored."""
    position = np.full(len(groups), np.iinfo(np.int64).max)
    rows = np.flatnonzero(generated)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    sizes = np.bincount(groups[rows], minlength=len(counts))
    position[rows] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.asarray(position < counts[groups])


def _beside(table: pa.Table, other: pa.Table) -> pa.Table:
    """The table with the columns of another, row for row, that it does not have."""
    for name in other.column_names:
        if name not in table.column_names:
            table = table.append_column(name, other.column(name))
    return table


def _facts_of(path: Path, texts: bool) -> pa.Table:
    """For each sample of a chunk file `content`, equal for equal completions; of texts length, clipped and empty."""
    if not texts:
        hashed = "image_sha256" in column_names(path)
        content = read_table(path, ["image_sha256"]).column("image_sha256") if hashed else pa.array(contents(path))
        return pa.table({"content": content})
    return pa.table(
        {
            "content": pa.array(contents(path)),
            "length": pa.array(lengths(path).astype(np.float64)),
            "clipped": clipped(path),
            "empty": pc.equal(pc.utf8_trim_whitespace(read_table(path, ["completion"]).column("completion")), ""),
        }
    )


def _held_out(
    inputs: StageInputs, judged: Sequence[str], round_: int | None = None, *, texts: bool = False
) -> pa.Table | None:
    """The held-out samples of this round, or of an earlier one, with what was measured of them; None without any."""
    when = "" if round_ is None else f"@{round_}"
    folders = {name: inputs[f"evaluate/{name}{when}"] for name in ("score", *judged)}
    tables = []
    for chunk in chunk_numbers(*folders.values()):  # of fewer than ten prompts none is held out
        paths = {name: folder / chunk_file(chunk) for name, folder in folders.items()}
        table = read_table(paths["score"], _SCORE)
        if "generate" in paths:
            table = _beside(table, _facts_of(paths["generate"], texts))
        if "judge" in paths:
            table = table.append_column("held_out", read_table(paths["judge"], ["score"]).column("score"))
        if "logp" in paths:
            table = table.append_column("log_ratio", pa.array(log_ratio(paths["logp"], paths["logp-start"])))
        tables.append(table)
    return pa.concat_tables(tables) if tables else None
