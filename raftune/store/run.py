"""A run is a directory; this is the one place that knows where things lie in it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raftune.errors import RunDamaged, RunInUse, StoreError
from raftune.store import commit as commits
from raftune.store.commit import Commit, FileEntry
from raftune.store.events import Events
from raftune.store.files import discard, explaining, sha256_of, sync_folder, unique, write_json

_ROUND = re.compile(r"round-(\d{4,})$")
CONFIG = "config.resolved.json"


class RunFolder:
    """The directory of one run: paths, COMMITs, the lock."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.tmp = self.root / "tmp"
        self.events = Events(self.root / "events.jsonl")

    # -- paths ------------------------------------------------------------------------------------------------------

    def folder(self, round_: int, name: str) -> Path:
        """Where the stage of this name writes in this round."""
        return self.root / f"round-{round_:04d}" / name

    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a directory, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for p in self.root.iterdir() if (m := _ROUND.match(p.name)) and p.is_dir())

    def exists(self) -> bool:
        return (self.root / CONFIG).is_file()

    # -- the configuration ------------------------------------------------------------------------------------------

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration. Raises StoreError where the folder holds no run, RunDamaged."""
        path = self.root / CONFIG
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.root} holds no run: {CONFIG} is missing. `raftune runs` lists the runs in a folder."
            ) from error
        except ValueError as error:
            raise RunDamaged(f"{path} is not valid JSON. Restore it: it is the run's configuration.") from error
        if not isinstance(data, dict):
            raise RunDamaged(f"{path} is not a JSON object. Restore it: it is the run's configuration.")
        return data

    def write_config(self, resolved: Mapping[str, Any]) -> None:
        write_json(self.tmp, self.root / CONFIG, resolved)

    # -- COMMITs ----------------------------------------------------------------------------------------------------

    def commit(self, round_: int, name: str) -> Commit | None:
        return Commit.load(self.folder(round_, name))

    def commit_hash(self, round_: int, name: str) -> str | None:
        """The SHA-256 of a stage's COMMIT, which stands for everything the stage was made from; None: not committed."""
        path = self.folder(round_, name) / commits.NAME
        return sha256_of(path) if path.is_file() else None

    def seal(self, commit: Commit, name: str) -> None:
        """Commits the stage: its files as they lie in its folder, listed with size and hash."""
        folder = self.folder(commit.round, name)
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        commit.save(folder, self.tmp)

    def entries(self, folder: Path, rows: Mapping[str, int] | None = None) -> dict[str, FileEntry]:
        """Every file in the folder but the COMMITs and the stages nested in it, by relative name."""
        nested = [path.parent for path in folder.rglob(commits.NAME) if path.parent != folder]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != commits.NAME]
        own = [p for p in files if not any(n in p.parents for n in nested)]
        names = [p.relative_to(folder).as_posix() for p in own]
        return {
            n: FileEntry(p.stat().st_size, sha256_of(p), (rows or {}).get(n)) for n, p in zip(names, own, strict=True)
        }

    def committed(self) -> Iterator[tuple[int, str, Commit]]:
        """Every COMMIT of the run: round, folder name, content."""
        for round_ in self.rounds():
            base = self.root / f"round-{round_:04d}"
            for path in sorted(base.rglob(commits.NAME)):
                name = path.parent.relative_to(base).as_posix()
                if commit := self.commit(round_, name):
                    yield round_, name, commit

    def faults(self) -> list[str]:
        """What is damaged, a line each: changed or missing files, and COMMITs whose inputs have been replaced."""
        found = []
        for round_, name, commit in self.committed():
            dropped = (self.folder(round_, name) / "DROPPED.json").is_file()
            found += [] if dropped else commit.faults(self.folder(round_, name))
            for read, expected in commit.inputs.items():
                source_round, source = read.split("/", 1)
                if self.commit_hash(int(source_round), source) != expected:
                    found.append(f"{self.folder(round_, name)} was made from another {read} than the one on disk")
        return found

    def supersede(self, round_: int, name: str) -> None:
        """Moves a stage aside, to superseded/: nothing that was drawn is ever deleted."""
        folder = self.folder(round_, name)
        if not folder.exists():
            return
        target = unique(self.root / "superseded", f"-round-{round_:04d}-{name.replace('/', '-')}")
        with explaining(folder):
            folder.rename(target)
            sync_folder(folder.parent)
            sync_folder(target.parent)

    def clear(self, round_: int, name: str) -> None:
        """Removes what an interrupted stage left in its folder."""
        discard(self.folder(round_, name), self.tmp)

    # -- the lock ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; what an earlier holder left under tmp/ is removed. Raises RunInUse."""
        with explaining(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "LOCK")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise RunInUse(
                    f"{self.root} is in use by another process. Wait for it to end, or choose another output_dir."
                ) from error
        try:
            self._empty_tmp()
            yield
        finally:
            lock.release()

    def _empty_tmp(self) -> None:
        with explaining(self.tmp):
            shutil.rmtree(self.tmp, ignore_errors=True)
            self.tmp.mkdir(exist_ok=True)
