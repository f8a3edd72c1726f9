"""A stage of one round, ready to run: paths resolved, key known, every file committed the same way."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from raftune.errors import EngineError, OutOfMemory
from raftune.protocols import OnceStage, Receipt, Stage, UnitStage
from raftune.store.commit import RECEIPTS, Commit, FileEntry, stage_key
from raftune.store.committed import remember
from raftune.store.files import (
    ensure_folder,
    publish_folder,
    publish_unsealed,
    sha256_of,
    stage_file,
    unique,
    write_json,
)
from raftune.store.interruption import raise_if_asked
from raftune.store.layout import batch_file, source_of, unit_file
from raftune.store.parquet import read_metadata
from raftune.store.partial import unfinished_work
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class Job:
    """`fields` are the values that shape the stage; `hashes` the COMMITs that it is made from, by "round/name"."""

    run: RunFolder
    stage: Stage
    round: int
    fields: Mapping[str, Any]
    hashes: Mapping[str, str]

    @cached_property
    def key(self) -> str:
        return stage_key(self.stage.name, self.fields, self.hashes)

    @cached_property
    def folder(self) -> Path:
        return self.run.folder(self.round, self.stage.writes)

    @cached_property
    def inputs(self) -> dict[str, Path]:
        return {read: self.run.folder(*source_of(read, self.round)) for read in self.stage.reads}

    @property
    def title(self) -> str:
        return f"{self.stage.name} of round {self.round}"

    def seal(self, files: Mapping[str, FileEntry], quarantined: Mapping[str, str] | None = None) -> None:
        """Commits these files of the folder."""
        commit = Commit(self.stage.name, self.round, self.key, self.fields, self.hashes, files, quarantined or {})
        self.run.seal(commit, self.stage.writes)
        remember(self.folder, files.items())


def make_job(run: RunFolder, stage: Stage, round_: int, config: Mapping[str, Any]) -> Job:
    """The job of a stage all of whose inputs are committed; `config` is the resolved configuration, as plain data."""
    hashes = hashes_of(run, stage, round_)
    assert all(hashes.values()), f"{stage.name} reads a stage that is not committed"
    return Job(run, stage, round_, fields_of(stage, config), hashes)


def fields_of(stage: Stage, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that shape the stage, by their names."""
    prints = {f"hash of {name}": value for name, value in stage.fingerprints().items()}
    return {name: dotted(config, name) for name in stage.fields} | prints


def hashes_of(run: RunFolder, stage: Stage, round_: int) -> dict[str, str]:
    """The hashes of the COMMITs that the stage is made from, by "round/name"; empty where there is none."""
    sources = [source_of(read, round_) for read in stage.reads]
    return {f"{source}/{name}": run.commit_hash(source, name) for source, name in sources}


def dotted(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field."""
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value


def run_once(job: Job, stage: OnceStage) -> tuple[str, ...]:
    """Runs the stage into tmp/, then publishes its files; the COMMIT comes last. Returns what a user should know."""
    staged = unique(job.run.tmp)
    staged.mkdir()
    try:
        notes = stage.run(job.inputs, staged)
        raise_if_asked()
        paths = sorted(path for path in staged.rglob("*") if path.is_file())
        files = {path.relative_to(staged).as_posix(): FileEntry.of(path) for path in paths}
        if stage.writes != "evaluate":  # its folder holds the stages that it is made from
            job.run.clear(job.round, stage.writes)
        publish_folder(staged, job.folder)
        job.seal(files)
        return notes or ()
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def run_unit(job: Job, stage: UnitStage, index: int) -> Receipt:
    """Runs and publishes one unit; when memory runs out, a smaller batch is put on record before the next try."""
    final, revision = job.folder / unit_file(index), job.folder / batch_file(index)
    began = time.perf_counter()
    notes: tuple[str, ...] = ()
    while True:
        metadata = revised(revision, job.key)
        try:
            with (
                unfinished_work(job.folder, job.run.tmp, f"{index:05d}", job.key, metadata),
                stage_file(job.run.tmp, final, publish_unsealed) as staged,
            ):
                notes += stage.run_unit(job.inputs, index, staged, metadata)
                raise_if_asked()
                rows, _ = read_metadata(staged)
                sha256, size = sha256_of(staged), staged.stat().st_size
            return Receipt(index, final.name, rows, sha256, size, time.perf_counter() - began, notes)
        except OutOfMemory as error:
            if error.batch_size <= 1:
                raise
            write_json(job.run.tmp, revision, {"batch_size": error.batch_size // 2, "key": job.key})
            notes += (
                f"unit {index}: out of memory at batch {error.batch_size}; drawn again at {error.batch_size // 2}",
            )


def revised(revision: Path, key: str) -> dict[str, str]:
    """The batch size that an earlier try at this unit put on record, as metadata of its table."""
    if not revision.is_file():
        return {}
    plan = json.loads(revision.read_text())
    return {"batch_size": str(plan["batch_size"])} if plan["key"] == key else {}


def note(job: Job, receipt: Receipt) -> None:
    """Puts on record that the unit lies on disk, until the COMMIT says so; a line that is lost costs its unit."""
    with (job.folder / RECEIPTS).open("a") as file:
        file.write(json.dumps({"key": job.key, **asdict(receipt)}) + "\n")


def receipts_of(job: Job) -> dict[int, Receipt]:
    """The units that an interrupted run left, each byte as it was noted then, by their number."""
    path = job.folder / RECEIPTS
    found = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            facts = json.loads(line)
            belongs = facts.pop("key") == job.key
            receipt = Receipt(**facts)
            whole = belongs and sha256_of(job.folder / receipt.file) == receipt.sha256
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if whole and receipt.file == unit_file(receipt.unit):
            found[receipt.unit] = receipt
    return found


def unfinished(job: Job, stage: UnitStage) -> tuple[list[int], list[Receipt]]:
    """The units still to run, and the receipts of those that an interrupted run left whole."""
    units, found = stage.units(job.inputs), receipts_of(job)
    return [unit for unit in units if unit not in found], [found[unit] for unit in units if unit in found]


def seal_units(job: Job, receipts: Sequence[Receipt], quarantined: Mapping[int, str]) -> None:
    """Commits the units; what else lies in the folder is removed.

    Raises EngineError where every unit was set aside.
    """
    if quarantined and not receipts:
        index, why = next(iter(quarantined.items()))
        raise EngineError(f"every unit of {job.title} failed; unit {index}: {why}. Mend the cause and resume.")
    ensure_folder(job.folder)
    files = {receipt.file: FileEntry(receipt.bytes, receipt.sha256, receipt.rows) for receipt in receipts}
    revisions = {batch_file(receipt.unit) for receipt in receipts}
    for path in job.folder.iterdir():
        if path.name in revisions and revised(path, job.key):
            files[path.name] = FileEntry.of(path)
        elif path.is_file() and path.name not in files and path.name != RECEIPTS:
            path.unlink()
    job.seal(files, {unit_file(index): why for index, why in sorted(quarantined.items())})


class Engine(Protocol):
    """Runs units and gives their receipts as they are committed; `failed` holds those that were set aside, and why."""

    failed: dict[int, str]

    def run(self, job: Job, stage: UnitStage, units: Sequence[int]) -> Iterator[Receipt]: ...

    def rest(self) -> None:
        """Lets go of the models that workers hold, before the loop's process loads one."""
        ...

    def close(self) -> None: ...
