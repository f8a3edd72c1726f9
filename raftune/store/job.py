"""A stage of one round, ready to run: paths, key and commit."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import Any, Protocol

from raftune.errors import EngineError, OutOfMemory
from raftune.protocols import ChunkedStage, JournalEntry, SingleStage, Stage
from raftune.store.commit import JOURNAL, FileEntry, Manifest, stage_key
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
from raftune.store.layout import batch_file, chunk_file, source_of
from raftune.store.parquet import read_metadata
from raftune.store.partial import unfinished_work
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class StageJob:
    """`fields` are the values that shape the stage; `hashes` the manifests that it is made from, by "round/name"."""

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
        made = (self.stage.name, self.round, self.key, self.fields, self.hashes)
        commit = Manifest(*made, files, quarantined or {}, self.stage.reproducible)
        self.run.seal(commit, self.stage.writes)
        remember(self.folder, files.items())


def make_job(run: RunFolder, stage: Stage, round_: int, config: Mapping[str, Any]) -> StageJob:
    """The job of a stage all of whose inputs are committed; `config` is the resolved configuration, as plain data."""
    hashes = hashes_of(run, stage, round_)
    assert all(hashes.values()), f"{stage.name} reads a stage that is not committed"
    return StageJob(run, stage, round_, fields_of(stage, config), hashes)


def fields_of(stage: Stage, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that shape the stage, by their names."""
    fields = {name: dotted(config, name) for name in stage.fields}
    for name, value in fields.items() if stage.unkeyed else ():
        if isinstance(value, Mapping):
            fields[name] = {key: part for key, part in value.items() if key not in stage.unkeyed}
    return fields | {f"hash of {name}": value for name, value in stage.fingerprints().items()}


def hashes_of(run: RunFolder, stage: Stage, round_: int) -> dict[str, str]:
    """The hashes of the manifests that the stage is made from, by "round/name"; empty where there is none."""
    sources = [source_of(read, round_) for read in stage.reads]
    return {f"{source}/{name}": run.commit_hash(source, name) for source, name in sources}


def dotted(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field."""
    return reduce(getitem, name.split("."), config)


def run_once(job: StageJob, stage: SingleStage) -> tuple[str, ...]:
    """Runs the stage into tmp/, then publishes its files, the manifest last. Returns its notes for the user."""
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


def run_chunk(job: StageJob, stage: ChunkedStage, index: int) -> JournalEntry:
    """Runs and publishes one chunk; out of memory, it records half the batch size and tries again.

    Raises RunInUse, and publishes nothing, if another process has taken the run meanwhile.
    """
    final, revision, tmp = job.folder / chunk_file(index), job.folder / batch_file(index), job.run.chunk_tmp

    def publish(staged: Path, final: Path) -> None:
        job.run.check_holder()
        publish_unsealed(staged, final)

    started = time.perf_counter()
    notes: tuple[str, ...] = ()
    while True:
        metadata = _revised(revision, job.key)
        try:
            with (
                unfinished_work(job.folder, tmp, f"{index:05d}", job.key, metadata, job.run.check_holder),
                stage_file(tmp, final, publish) as staged,
            ):
                notes += stage.run_chunk(job.inputs, index, staged, metadata)
                raise_if_asked()
                entry = FileEntry.of(staged, read_metadata(staged)[0])
            seconds = time.perf_counter() - started
            return JournalEntry(index, final.name, entry.rows or 0, entry.sha256, entry.bytes, seconds, notes)
        except OutOfMemory as error:
            if error.batch_size <= 1:
                raise
            size = error.batch_size // 2
            job.run.check_holder()
            write_json(tmp, revision, {"batch_size": size, "key": job.key})
            notes += (f"chunk {index}: out of memory at batch {error.batch_size}; generated again at {size}",)
        except OSError:
            job.run.check_holder()  # the next holder removed the folder in which this was written
            raise


def _revised(revision: Path, key: str) -> dict[str, str]:
    """The batch size that an earlier try at this chunk recorded, as metadata of its table."""
    plan = json.loads(revision.read_text()) if revision.is_file() else {"key": None}
    return {"batch_size": str(plan["batch_size"])} if plan["key"] == key else {}


def note(job: StageJob, entry: JournalEntry) -> None:
    """Records in the journal that the chunk is on disk; a lost line costs its chunk."""
    with (job.folder / JOURNAL).open("a") as file:
        file.write(json.dumps({"key": job.key, **asdict(entry)}) + "\n")


def journal_of(job: StageJob) -> dict[int, JournalEntry]:
    """The chunks that an interrupted run left unchanged on disk, by number."""
    path = job.folder / JOURNAL
    entries = {}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            facts = json.loads(line)
            same_job = facts.pop("key") == job.key
            entry = JournalEntry(**facts)
            unchanged = same_job and sha256_of(job.folder / entry.file) == entry.sha256
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if unchanged and entry.file == chunk_file(entry.chunk):
            entries[entry.chunk] = entry
    return entries


def unfinished(job: StageJob, stage: ChunkedStage) -> tuple[list[int], list[JournalEntry]]:
    """The chunks still to run, and the journal entries of those that an interrupted run left whole."""
    chunks, done = stage.chunks(job.inputs), journal_of(job)
    return [chunk for chunk in chunks if chunk not in done], [done[chunk] for chunk in chunks if chunk in done]


def seal_chunks(job: StageJob, entries: Sequence[JournalEntry], quarantined: Mapping[int, str]) -> None:
    """Commits the chunks and deletes other files in the folder. Raises EngineError where every chunk failed."""
    if quarantined and not entries:
        index, why = next(iter(quarantined.items()))
        raise EngineError(f"every chunk of {job.title} failed; chunk {index}: {why}. Fix the cause and resume.")
    ensure_folder(job.folder)
    files = {entry.file: FileEntry(entry.bytes, entry.sha256, entry.rows) for entry in entries}
    revisions = {batch_file(entry.chunk) for entry in entries}
    for path in job.folder.iterdir():
        if path.name in revisions and _revised(path, job.key):
            files[path.name] = FileEntry.of(path)
        elif path.is_file() and path.name not in files and path.name != JOURNAL:
            path.unlink()
    job.seal(files, {chunk_file(index): why for index, why in sorted(quarantined.items())})


class Engine(Protocol):
    """Runs chunks and yields their journal entries; `failed` holds the chunks that were skipped, and why."""

    failed: dict[int, str]

    def run(self, job: StageJob, stage: ChunkedStage, chunks: Sequence[int]) -> Iterator[JournalEntry]: ...

    def rest(self) -> None:
        """Frees the models that workers hold, before the loop's process loads one."""

    def close(self) -> None: ...
