"""Stage `guard`: compares generated with kept samples, and raises alarms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import BoolArray, IntArray
from raftune.config.guards import thresholds
from raftune.protocols import Monitor, MonitorInput, StageInputs
from raftune.records import INVALID
from raftune.stages.evaluate import plain
from raftune.stages.select import clipped, contents, lengths, read_verdicts
from raftune.store.committed import read_json
from raftune.store.files import json_bytes
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table

VERDICT = ("sample_id", "prompt_id", "k", "source", "score", "weight")
JUDGED = ("sample_id", "prompt_id", "k", "score")


class GuardStage:
    """metrics.json, of what was generated and of what was selected, and alarms.json: evidence, with samples to look at.

    `judged` are the folders of the held-out samples, besides their scores: "generate", "judge", "logp" and
    "logp-start". `judge` is the held-out reward in words, empty without one.
    """

    name = writes = "guard"
    grows = True  # a later version has thresholds and inputs that an earlier one did not know

    def __init__(
        self,
        examiner: Monitor,
        factors: Callable[[], Mapping[str, float]],
        *,
        round_: int,
        shards: tuple[str, ...] = ("generate",),
        judged: tuple[str, ...] = (),
        judge: str = "",
        texts: bool = True,
        condense: Callable[[pa.Table], pa.Table] | None = None,
        counts: Callable[[pa.Table], pa.Table] = lambda samples: samples,
    ) -> None:
        """`condense` puts what is measured of completions in place of those that are too large to be held of all.

        `counts` adds what each reward counts in the score, where that is not its value.
        """
        self.examiner, self.factors, self.round = examiner, factors, round_
        self.shards, self.judged, self.judge, self.texts = shards, judged, judge, texts
        self.condense, self.counts = condense, counts
        self.fields = thresholds(pictures=condense is not None)
        now = tuple(f"evaluate/{name}" for name in ("score", *judged)) if judged else ()
        then = [f"evaluate/{name}@{r}" for r in range(round_) for name in ("score", "judge")] if judge else []
        first = ["guard@1"] if round_ > 1 else []
        self.reads = (*shards, "score", "select", "model", *now, *then, *first)

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: StageInputs, out: Path) -> None:
        evidence = MonitorInput(
            round=self.round,
            samples=self.counts(pa.concat_tables(self.samples(inputs))),
            factors=self.factors(),
            held_out=judged_samples(inputs, self.judged, texts=self.texts) if self.judged else None,
            earlier=[judged_samples(inputs, ("judge",), r) for r in range(self.round)] if self.judge else [],
            judge=self.judge,
            first=read_json(inputs["guard@1"] / "metrics.json")["generated"] if self.round > 1 else None,
            losses=read_json(inputs["model"] / "training.json")["losses"],
        )
        sets = self.examiner.measures(evidence)
        for name, found in (("metrics", sets), ("alarms", self.examiner.alarms(evidence, sets))):
            (out / f"{name}.json").write_bytes(json_bytes(plain(found)))

    def samples(self, inputs: StageInputs) -> Iterator[pa.Table]:
        """Unit by chunk what is known of the samples: numbers of all, texts of few."""
        for chunk, verdicts in read_verdicts(inputs["select"] / "verdicts.parquet", VERDICT):
            scores = read_table(inputs["score"] / chunk_file(chunk))
            table = verdicts
            for name in scores.column_names:
                if name.startswith("rewards/"):
                    table = table.append_column(name, scores.column(name))
            paths = [inputs[name] / chunk_file(chunk) for name in self.shards]
            yield self.with_looks(table, paths) if self.condense is not None else self.with_texts(table, paths)

    def with_looks(self, table: pa.Table, paths: Sequence[Path]) -> pa.Table:
        """The chunk's samples with what was measured of their completions, and which of them are the control."""
        assert self.condense is not None
        known = self.condense(pa.concat_tables([read_table(path, completions_in(path)) for path in paths]))
        table = beside(table, known)
        table = beside(table, pa.concat_tables([told_of(path, texts=False) for path in paths]))
        return table.append_column("control", pa.array(self.control(table)))

    def control(self, table: pa.Table) -> BoolArray:
        """(N,) as many of the policy's own samples of each prompt as were kept of it, whatever they scored."""
        own = pc.equal(table.column("source"), "policy").to_numpy(zero_copy_only=False)
        groups = numbers_of(table.column("prompt_id"))
        return as_many(groups, own, np.bincount(groups, weights=table.column("weight").to_numpy() > 0).astype(np.int64))

    def with_texts(self, table: pa.Table, paths: Sequence[Path]) -> pa.Table:
        """The chunk's samples with what the measures of texts need, where the samples are texts."""
        if not self.texts:
            return table
        texts = pa.concat_tables([read_table(path, ["completion"]) for path in paths]).column("completion")
        texts = pc.fill_null(texts, "")  # an invalid sample may have none
        own = pc.equal(table.column("source"), "policy").to_numpy(zero_copy_only=False)
        kept, control = table.column("weight").to_numpy() > 0, self.control(table)
        groups = numbers_of(table.column("prompt_id"))
        found = self.examiner.similarities(texts.filter(pa.array(own)).to_pylist(), groups[own])
        table = beside(table, pa.concat_tables([told_of(path, texts=True) for path in paths]))
        columns = {
            "similarity": pa.array(np.append(found, np.nan)[np.minimum(groups, len(found))], from_pandas=True),
            "control": pa.array(control),
            "text": pc.if_else(pa.array(kept | control), texts, pa.scalar(None, texts.type)),
        }
        for name, values in columns.items():
            table = table.append_column(name, values)
        return table


def completions_in(path: Path) -> list[str]:
    """The columns of a chunk file that say what its completions are."""
    return [name for name in ("sample_id", "completion", INVALID) if name in column_names(path)]


def as_many(groups: IntArray, own: BoolArray, counts: IntArray) -> BoolArray:
    """(N,) of each prompt its first counts[prompt] own samples: as good as chosen by chance, whatever they scored."""
    place = np.full(len(groups), np.iinfo(np.int64).max)
    rows = np.flatnonzero(own)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    sizes = np.bincount(groups[rows], minlength=len(counts))
    place[rows] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.asarray(place < counts[groups])


def numbers_of(names: pa.ChunkedArray) -> IntArray:
    """For each row the number of its name, in order of appearance."""
    return np.asarray(pc.index_in(names, value_set=pc.unique(names)).to_numpy(zero_copy_only=False), dtype=np.int64)


def beside(table: pa.Table, other: pa.Table) -> pa.Table:
    """The table with the columns of another, row for row, that it does not have."""
    for name in other.column_names:
        if name not in table.column_names:
            table = table.append_column(name, other.column(name))
    return table


def told_of(path: Path, texts: bool) -> pa.Table:
    """Of each sample of a chunk file: `content`, equal where two are the same; of texts length, clipped and empty.

    Null where that is not known.
    """
    if not texts:
        own = "image_sha256" in column_names(path)
        named = read_table(path, ["image_sha256"]).column("image_sha256") if own else pa.array(contents(path))
        return pa.table({"content": named})
    return pa.table(
        {
            "content": pa.array(contents(path)),
            "length": pa.array(lengths(path).astype(np.float64)),
            "clipped": clipped(path),
            "empty": pc.equal(pc.utf8_trim_whitespace(read_table(path, ["completion"]).column("completion")), ""),
        }
    )


def judged_samples(
    inputs: StageInputs, judged: Sequence[str], round_: int | None = None, *, texts: bool = False
) -> pa.Table | None:
    """The held-out samples of this round, or of an earlier one, with what was measured of them; None without any."""
    when = "" if round_ is None else f"@{round_}"
    folders = {name: inputs[f"evaluate/{name}{when}"] for name in ("score", *judged)}
    chunks = chunk_numbers(*folders.values())  # of fewer than ten prompts none is held out
    return pa.concat_tables(judged_chunk(folders, chunk, texts) for chunk in chunks) if chunks else None


def judged_chunk(folders: Mapping[str, Path], chunk: int, texts: bool) -> pa.Table:
    table = read_table(folders["score"] / chunk_file(chunk), JUDGED)
    if "generate" in folders:
        table = beside(table, told_of(folders["generate"] / chunk_file(chunk), texts))
    if "judge" in folders:
        table = table.append_column(
            "held_out", read_table(folders["judge"] / chunk_file(chunk), ["score"]).column("score")
        )
    if "logp" in folders:
        ours, start = (
            read_table(folders[name] / chunk_file(chunk), ["log_prob"]).column("log_prob")
            for name in ("logp", "logp-start")
        )
        table = table.append_column("log_ratio", pc.subtract(ours, start))
    return table
