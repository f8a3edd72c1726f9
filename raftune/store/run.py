"""The run directory: its configuration, manifests, event log and lock."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raftune.config.load import differences, read_yaml, validate
from raftune.config.paths import moved
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, RunDamaged, RunInUse, StoreError
from raftune.sanitize import shell_command
from raftune.store.commit import (
    MARKER,
    NAME,
    ROUND,
    SELF,
    DroppedFiles,
    FileEntry,
    Manifest,
    has_changed,
    is_own,
    too_old,
    with_hash,
)
from raftune.store.committed import committed, fix_of
from raftune.store.files import discard, ensure_folder, explaining, sha256_of, sync, unique, write_json
from raftune.store.kinds import RUN_CONFIG, why_no_run

CONFIG, YAML = RUN_CONFIG, "config.yaml"
RECORD = "raftune"  # the key in the configuration on disk of what is recorded beside its sections
AGAIN = "again"  # the folder of the scores that `--only` keeps while their stages are redone
DROPPED = MARKER
_HELD = "held"  # the file in the folder of the lock's holder that exists for as long as it holds the lock
_TAIL = 1 << 16  # bytes at the end of the event log that hold the last event


class EventLog:
    """Times, hosts, memory and retries in `events.jsonl`. A line that a kill cut short is skipped when reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = True

    def add(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, ensure_ascii=False, default=str)
        torn = False
        if self._fresh and self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb") as file:
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
        self._fresh = False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    with contextlib.suppress(ValueError):
                        yield json.loads(line)

    def last(self) -> dict[str, Any]:
        """The last event, read from the end of the file; empty without one."""
        if not self.path.is_file():
            return {}
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                if isinstance(event := json.loads(line), dict):
                    return event
        return {}


class RunFolder:
    """The directory of one run."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.tmp = self.root / "tmp"
        self.holder: str | None = None  # the holder of the lock that this process works for, itself or another
        self.events = EventLog(self.root / "events.jsonl")

    def folder(self, round_: int, name: str) -> Path:
        """Where the stage of this name writes in this round."""
        return self.root / f"round-{round_:04d}" / name

    def earlier_scores(self, round_: int, name: str) -> Path:
        """Where `--only` keeps the scores of a score stage until it is redone: see `raftune.runtime.rescoring`."""
        return self.root / AGAIN / f"{round_}-{name.replace('/', '-')}"

    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a directory, ascending."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if ROUND.fullmatch(path.name) and path.is_dir())
        numbers = {name: int(name.removeprefix("round-")) for name in names}
        return sorted(number for name, number in numbers.items() if name == f"round-{number:04d}")

    def exists(self) -> bool:
        return (self.root / CONFIG).is_file()

    # -- the configuration ------------------------------------------------------------------------------------------

    def _read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The resolved configuration, and what is recorded beside it."""
        path = self.root / CONFIG
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(why_no_run(self.root)) from error
        except ValueError as error:
            raise RunDamaged(f"{path} is not valid JSON. Restore it: it is the run's configuration.") from error
        if not isinstance(data, dict):
            raise RunDamaged(f"{path} is not a JSON object. Restore it: it is the run's configuration.")
        if "tuning" in data:
            raise too_old(path)
        if has_changed(data, "output_dir"):
            changed = difference_to_yaml(self.root / YAML, data)
            fields = [f"{name} is {old!r} here and {new!r} in {YAML}" for name, (old, new) in changed.items()]
            again = shell_command("raftune", "train", self.root / YAML, "--output-dir", self.root)
            raise RunDamaged(
                f"{path} has changed since it was written{': ' if fields else ''}{', '.join(fields[:3])}. Restore it; "
                f"to write it anew, start the run again from {YAML} or a file of your own: `{again}`."
            )
        record = data.get(RECORD)
        config = {name: value for name, value in data.items() if name not in (SELF, RECORD)}
        return config, record if isinstance(record, dict) else {}

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration. Raises StoreError where the folder holds no run, RunDamaged, RunTooOld."""
        return self._read()[0]

    def config_record(self) -> dict[str, Any]:
        """What is recorded beside the configuration: `files`, the hashes of those written with it, and `folder`.

        Empty in a run of an earlier version. Raises what `read_config` raises.
        """
        return self._read()[1]

    def recorded(self, name: str) -> Path:
        """A file that was written with the configuration. Raises RunDamaged where it has changed or is missing."""
        path, sha256 = self.root / name, self.config_record().get("files", {}).get(name)
        if sha256 is not None and (not path.is_file() or sha256_of(path) != sha256):
            how = "has changed since it was written" if path.is_file() else "is missing"
            verify = shell_command("raftune", "verify", self.root)
            raise RunDamaged(f"{path} {how}. Restore it; `{verify}` says what else is damaged.")
        return path

    def _recorded_base(self) -> str | None:
        """The path from the run to the folder of its paths; None where that is not recorded or cannot be trusted."""
        try:
            folder = self.config_record().get("folder")
        except StoreError:
            return None
        return folder if isinstance(folder, str) else None

    def base(self) -> Path:
        """The folder that paths in the run's configuration are relative to: the working directory of its first start.

        It is recorded relative to the run, so that both can be moved together. Where it is not recorded, it is the
        current working directory.
        """
        folder = self._recorded_base()
        path = self.root / folder if folder is not None else Path.cwd()
        return path.resolve() if path.is_dir() else Path.cwd()

    def configuration(self) -> RunConfig:
        """The configuration, its paths relative to the working directory. Raises what `read_config` raises."""
        recorded = self.read_config()
        base = self.base()
        return validate(recorded if base == Path.cwd() else moved(recorded, base, Path.cwd()))

    def as_recorded(self, config: RunConfig) -> dict[str, Any]:
        """A configuration as the run records it: plain data, its paths relative to the run's base."""
        plain = config.model_dump(mode="json")
        if self.exists() and self._recorded_base() is None:  # no path, or a run of an earlier version
            return plain
        return moved(plain, Path.cwd(), self.base())

    def write_config(self, resolved: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        content = {**resolved, **({RECORD: dict(record)} if record else {})}
        write_json(self.tmp, self.root / CONFIG, with_hash(content))

    # -- manifests ----------------------------------------------------------------------------------------------------

    def commit(self, round_: int, name: str) -> Manifest | None:
        return committed(self.folder(round_, name))

    def is_committed(self, round_: int, name: str) -> bool:
        return (self.folder(round_, name) / NAME).is_file()

    def rounds_with(self, name: str) -> list[int]:
        """The rounds in which the stage is committed, ascending. Raises RunDamaged where its manifest was lost."""
        return [round_ for round_ in self.rounds() if self.was_made(round_, name)]

    def was_made(self, round_: int, name: str) -> bool:
        """Whether the stage is committed. Raises RunDamaged where its manifest is gone.

        That is so where another stage of the round was made from it, or the round has files of it and is over.
        """
        if self.is_committed(round_, name):
            return True
        folder = self.folder(round_, name)
        commits = [committed(self.folder(*key)) for key in self.places([round_])]
        used = any(commit is not None and f"{round_}/{name}" in commit.inputs for commit in commits)
        if not used and holds_files(folder):  # is the round over?
            started = any(self.is_committed(*key) for key in self.places([round_ + 1]))
            used = started or self.events.last().get("event") == "end"
        if used:
            raise RunDamaged(f"{folder / NAME} is missing. {fix_of(folder)}")
        return False

    def is_dropped(self, round_: int, name: str) -> bool:
        """Whether the stage's files were deleted on purpose."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return dropped is not None and not dropped.columns

    def dropped_columns(self, round_: int, name: str) -> tuple[str, ...]:
        """The columns that were deleted from the stage's tables on purpose."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return dropped.columns if dropped is not None else ()

    def files_now(self, round_: int, name: str, commit: Manifest) -> dict[str, FileEntry]:
        """The files of a committed stage as they should be, after what was deleted on purpose."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return {**commit.files, **(dropped.files if dropped is not None else {})}

    def commit_hash(self, round_: int, name: str) -> str:
        """SHA-256 of a stage's manifest, which covers all inputs; empty if it is not committed."""
        return sha256_of(self.folder(round_, name) / NAME) if self.is_committed(round_, name) else ""

    def seal(self, commit: Manifest, name: str) -> None:
        """Commits the stage, whose files are all in its folder, durably."""
        commit.save(self.folder(commit.round, name), self.tmp)

    def places(self, rounds: Sequence[int] | None = None) -> Iterator[tuple[int, str]]:
        """Every folder that a stage has written, by round and name: all committed ones, and all of a round's own."""
        for round_ in self.rounds() if rounds is None else rounds:
            base = self.root / f"round-{round_:04d}"
            if base.is_dir():
                sealed = (path.parent.relative_to(base).as_posix() for path in sorted(base.rglob(NAME)))
                folders = (path.name for path in sorted(base.iterdir()) if path.is_dir())
                yield from ((round_, name) for name in dict.fromkeys([*sealed, *folders]))

    def faults(self, without: Collection[tuple[int, str]] = ()) -> list[str]:
        """What is damaged, a line each: changed or missing files, then manifests whose inputs have been replaced.

        Stages in `without` are skipped. Raises RunTooNew.
        """
        pairs = [self._faults(*key) for key in self.places() if key not in without]
        return [fault for faults in zip(*pairs, strict=True) for part in faults for fault in part]

    def faults_of(self, round_: int, name: str) -> list[str]:
        """What is damaged in one stage's folder, a line each. Raises RunTooNew."""
        damaged, replaced = self._faults(round_, name)
        return damaged + replaced

    def _faults(self, round_: int, name: str) -> tuple[list[str], list[str]]:
        """How a stage's files differ from what was committed, and which of its inputs have been replaced since."""
        folder = self.folder(round_, name)
        try:
            commit = Manifest.load(folder)
        except RunDamaged as error:
            return [str(error).split(". ")[0]], []
        if commit is None:
            return [], []
        inputs = {read: read.split("/", 1) for read in commit.inputs}
        current = {read: self.commit_hash(int(number), source) for read, (number, source) in inputs.items()}
        gone = [read for read, expected in commit.inputs.items() if current[read] != expected]
        replaced = [f"{folder} was made from another {read} than the one on disk" for read in gone]
        try:
            return commit.faults(folder, DroppedFiles.load(folder)), replaced
        except RunDamaged as error:
            return [str(error).split(". ")[0]], replaced

    def supersede(self, round_: int, name: str) -> None:
        """Moves a stage to superseded/, except stages in folders below it: nothing that was generated is deleted.

        Its manifest goes first, so that a kill leaves a stage that is not committed.
        """
        folder = self.folder(round_, name)
        if not folder.is_dir():
            return
        target = unique(self.root / "superseded", f"-round-{round_:04d}-{name.replace('/', '-')}")
        nested = {path.relative_to(folder).parts[0] for path in folder.glob(f"*/**/{NAME}")}
        paths = [path for path in folder.iterdir() if path.name not in nested]
        with explaining(folder):
            if paths:
                ensure_folder(target)
            for path in sorted(paths, key=lambda path: path.name != NAME):
                path.rename(target / path.name)
            if not nested:
                folder.rmdir()
            sync(*([target] if paths else []), folder if nested else folder.parent)

    def clear(self, round_: int, name: str) -> None:
        """Deletes what an interrupted stage left in its folder."""
        discard(self.folder(round_, name), self.tmp)

    # -- the lock and its holder ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process, and empties tmp/; from then on workers of an earlier holder publish nothing.

        Raises RunInUse, and StoreError where the directory cannot be written, also later while it is held.
        """
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"output_dir must be a directory; {self.root} is a file. Choose another output_dir.")
        with explaining(self.root):
            ensure_folder(self.root)
            lock = FileLock(self.root / "LOCK")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RunInUse(
                    f"{self.root} is in use by another process. Wait for it to end, or choose another output_dir."
                ) from error
            try:
                for folder in self.tmp.glob("holder-*"):  # at once: a worker may be writing in it
                    folder.rename(self.tmp / uuid.uuid4().hex)
                shutil.rmtree(self.tmp, ignore_errors=True)
                self.holder = f"holder-{uuid.uuid4().hex}"
                self.chunk_tmp.mkdir(parents=True)
                (self.chunk_tmp / _HELD).touch()
                yield
            finally:
                shutil.rmtree(self.chunk_tmp, ignore_errors=True)
                self.holder = None
                lock.release()

    @property
    def chunk_tmp(self) -> Path:
        """Where chunks are written before they are published: the holder's own folder, which ends with its lock."""
        return self.tmp if self.holder is None else self.tmp / self.holder

    def is_held(self) -> bool:
        """Whether the holder that this process works for still has the lock."""
        try:
            (self.chunk_tmp / _HELD).open().close()  # on a network file system, opening asks the server
        except OSError:
            return False
        return True

    def check_holder(self) -> None:
        """Raises RunInUse if the holder that this process works for has lost the lock.

        A file in `chunk_tmp` cannot be published after that either: the next holder moves the folder away first.
        """
        if self.holder is not None and not self.is_held():
            raise RunInUse(
                f"{self.root} is no longer held by the process that this worker was started for. Nothing was "
                "published: the process that holds the run now does this work."
            )


def holds_files(folder: Path) -> bool:
    """Whether a stage has left anything in its folder."""
    return folder.is_dir() and any(path.is_file() and not is_own(path.name) for path in folder.iterdir())


def difference_to_yaml(path: Path, data: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of a resolved configuration that differ from a YAML file, each with both values.

    Empty where the file cannot be read.
    """
    try:
        other = validate(read_yaml(path)).model_dump(mode="json") | {"output_dir": None}
    except ConfigError:
        return {}
    folder = data.get(RECORD, {}).get("folder") if isinstance(data.get(RECORD), dict) else None
    if isinstance(folder, str):
        other = moved(other, Path.cwd(), path.parent / folder)
    return differences({name: value for name, value in data.items() if name not in (SELF, RECORD)}, other)
