"""A stage of one round, ready to run: paths resolved, key known, every file committed the same way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raftune.errors import OutOfMemory, RunDamaged
from raftune.protocols import OnceStage, Receipt, Stage, UnitStage
from raftune.store.commit import Commit, stage_key
from raftune.store.files import publish, sha256_of, stage_file, unique, write_json
from raftune.store.layout import source_of, unit_file
from raftune.store.parquet import read_metadata, read_table
from raftune.store.run import RunFolder

KEY = "raftune.key"


@dataclass(frozen=True)
class Job:
    """`fields` are the values that shape the stage; `hashes` the COMMITs that it is made from, by "round/name"."""

    run: RunFolder
    stage: Stage
    round: int
    fields: Mapping[str, Any]
    hashes: Mapping[str, str]

    @property
    def key(self) -> str:
        return stage_key(self.stage.name, self.fields, self.hashes)

    @property
    def folder(self) -> Path:
        return self.run.folder(self.round, self.stage.writes)

    @property
    def inputs(self) -> dict[str, Path]:
        return {read: self.run.folder(*source_of(read, self.round)) for read in self.stage.reads}

    @property
    def title(self) -> str:
        return f"{self.stage.name} of round {self.round}"

    def seal(self, rows: Mapping[str, int] | None = None, quarantined: Mapping[str, str] | None = None) -> None:
        """Commits what lies in the folder."""
        entries = self.run.entries(self.folder, rows)
        commit = Commit(self.stage.name, self.round, self.key, self.fields, self.hashes, entries, quarantined or {})
        self.run.seal(commit, self.stage.writes)


def make_job(run: RunFolder, stage: Stage, round_: int, config: Mapping[str, Any]) -> Job:
    """The job of a stage all of whose inputs are committed; `config` is the resolved configuration, as plain data."""
    fields = {name: dotted(config, name) for name in stage.fields}
    fields |= {f"hash of {name}": value for name, value in stage.fingerprints().items()}
    hashes = {}
    for read in stage.reads:
        source_round, name = source_of(read, round_)
        found = run.commit_hash(source_round, name)
        assert found is not None, f"{read} must be committed before {stage.name}"
        hashes[f"{source_round}/{name}"] = found
    return Job(run, stage, round_, fields, hashes)


def dotted(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def run_once(job: Job, stage: OnceStage) -> None:
    """Runs the stage into tmp/, then publishes file by file; the COMMIT comes last."""
    nested = stage.writes == "evaluate"  # its folder holds the stages that were its inputs
    if not nested:
        job.run.clear(job.round, stage.writes)
    staged = unique(job.run.tmp)
    staged.mkdir()
    try:
        stage.run(job.inputs, staged)
        for path in sorted(staged.rglob("*")):
            if path.is_file():
                publish(path, job.folder / path.relative_to(staged))
        job.seal()
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def run_unit(job: Job, stage: UnitStage, index: int) -> Receipt:
    """Runs and publishes one unit; when memory runs out, a smaller batch is put on record before the next try."""
    final = job.folder / unit_file(index)
    revision = job.folder / f"unit-{index:05d}.batch.json"
    began = time.perf_counter()
    notes: tuple[str, ...] = ()
    while True:
        metadata = {KEY: job.key} | revised(revision, job.key)
        try:
            with stage_file(job.run.tmp, final) as staged:
                notes += stage.run_unit(job.inputs, index, staged, metadata)
            break
        except OutOfMemory as error:
            if error.batch_size <= 1:
                raise
            write_json(job.run.tmp, revision, {"batch_size": error.batch_size // 2, "key": job.key})
            notes += (
                f"unit {index}: out of memory at batch {error.batch_size}; drawn again at {error.batch_size // 2}",
            )
    receipt = receipt_of(job, index)
    assert receipt is not None
    return Receipt(index, final.name, receipt.rows, receipt.sha256, time.perf_counter() - began, notes)


def revised(revision: Path, key: str) -> dict[str, str]:
    """The batch size that an earlier try at this unit put on record, as metadata of its table."""
    if not revision.is_file():
        return {}
    plan = json.loads(revision.read_text())
    return {"batch_size": str(plan["batch_size"])} if plan["key"] == key else {}


def receipt_of(job: Job, index: int) -> Receipt | None:
    """The receipt of a unit that lies on disk whole and belongs to this job; None otherwise."""
    path = job.folder / unit_file(index)
    if not path.is_file():
        return None
    try:
        rows, metadata = read_metadata(path)
        if metadata.get(KEY) != job.key:
            return None
        read_table(path)  # verifies every page
    except RunDamaged:
        return None
    return Receipt(index, path.name, rows, sha256_of(path))


def unfinished(job: Job, stage: UnitStage) -> tuple[list[int], list[Receipt]]:
    """The units still to run, and the receipts of those that an interrupted run left whole."""
    missing, found = [], []
    for index in stage.units(job.inputs):
        receipt = receipt_of(job, index)
        if receipt is None:
            missing.append(index)
        else:
            found.append(receipt)
    return missing, found


def seal_units(job: Job, receipts: Iterable[Receipt], quarantined: Mapping[int, str]) -> None:
    """Commits the units; files in the folder that belong to none of them are removed first."""
    rows = {receipt.file: receipt.rows for receipt in receipts}
    for path in job.folder.glob("unit-*"):
        stem = path.name.split(".")[0] + ".parquet"
        if stem not in rows:
            path.unlink()
    job.seal(rows, {unit_file(index): why for index, why in sorted(quarantined.items())})


class Engine(Protocol):
    """Runs units and gives their receipts as they are committed; `failed` holds those that were set aside, and why."""

    failed: dict[int, str]

    def run(self, job: Job, stage: UnitStage, units: Sequence[int]) -> Iterator[Receipt]: ...

    def rest(self) -> None:
        """Lets go of the models that workers hold, before the loop's process loads one."""
        ...

    def close(self) -> None: ...
