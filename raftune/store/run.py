"""The run directory: paths of everything in it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raftune.config.load import differences, read_yaml, validate
from raftune.config.paths import moved
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, RunDamaged, RunInUse, StoreError
from raftune.sanitize import shell_command
from raftune.store import commit as commits
from raftune.store.commit import MARKER, SELF, DroppedFiles, FileEntry, Manifest, has_changed, is_own, with_hash
from raftune.store.committed import committed, fix_of
from raftune.store.events import EventLog
from raftune.store.files import discard, ensure_folder, explaining, sha256_of, sync, unique, write_json
from raftune.store.kinds import RUN_CONFIG, why_no_run

_ROUND = re.compile(r"round-(\d{4,})$")
CONFIG, YAML = RUN_CONFIG, "config.yaml"
RECORD = "raftune"  # in the configuration on disk, beside its sections: what is recorded with it
AGAIN = "again"  # the scores that `--only` keeps, while their stages are made anew
DROPPED = MARKER  # beside the manifest of a stage of which something was deleted on purpose


class RunFolder:
    """The directory of one run: paths, manifests, the lock."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.tmp = self.root / "tmp"
        self.events = EventLog(self.root / "events.jsonl")

    # -- paths ------------------------------------------------------------------------------------------------------

    def folder(self, round_: int, name: str) -> Path:
        """Where the stage of this name writes in this round."""
        return self.root / f"round-{round_:04d}" / name

    def earlier_scores(self, round_: int, name: str) -> Path:
        """Where the scores lie that a score stage keeps, until it is made anew: see `raftune.runtime.rescoring`."""
        return self.root / AGAIN / f"{round_}-{name.replace('/', '-')}"

    def rounds(self) -> list[int]:
        """The numbers of the rounds that have a directory, ascending."""
        if not self.root.is_dir():
            return []
        found = [(p, int(m[1])) for p in self.root.iterdir() if (m := _ROUND.match(p.name)) and p.is_dir()]
        return sorted(number for path, number in found if path.name == f"round-{number:04d}")

    def exists(self) -> bool:
        return (self.root / CONFIG).is_file()

    # -- the configuration ------------------------------------------------------------------------------------------

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration. Raises StoreError where the folder holds no run, RunDamaged, RunTooOld."""
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
            raise commits.too_old(path)
        if has_changed(data):
            again = shell_command("raftune", "train", self.root / YAML, "--output-dir", self.root)
            raise RunDamaged(
                f"{path} has changed since it was written{self._difference(data)}. Restore it; to write it anew, start "
                f"the run again from {YAML} or a file of your own: `{again}`."
            )
        return {name: value for name, value in data.items() if name not in (SELF, RECORD)}

    def recorded(self, name: str) -> Path:
        """A file that was written with the configuration. Raises RunDamaged where it has changed since, or is gone."""
        path, known = self.root / name, self.config_record().get("files", {}).get(name)
        if known is not None and (not path.is_file() or sha256_of(path) != known):
            how = "has changed since it was written" if path.is_file() else "is missing"
            again = shell_command("raftune", "verify", self.root)
            raise RunDamaged(f"{path} {how}. Restore it; `{again}` says what else is damaged.")
        return path

    def config_record(self) -> dict[str, Any]:
        """What is recorded beside the configuration: `files`, the hashes of those that were written with it.

        Empty in a run of an earlier version. Raises what `read_config` raises.
        """
        self.read_config()
        record = json.loads((self.root / CONFIG).read_bytes()).get(RECORD)
        return record if isinstance(record, dict) else {}

    def base(self) -> Path:
        """The folder to which paths in the run's configuration are relative: where the process stood that began it.

        It is known by its place beside the run, so that both can be moved together. Where it is not on record, it is
        the folder where this process stands.
        """
        folder = self._known_record().get("folder")
        place = self.root / folder if isinstance(folder, str) else Path.cwd()
        return place.resolve() if place.is_dir() else Path.cwd()

    def _known_record(self) -> dict[str, Any]:
        """The record beside the configuration, empty where it cannot be believed: it is about to be written anew."""
        try:
            return self.config_record()
        except StoreError:
            return {}

    def configuration(self) -> RunConfig:
        """The configuration, its paths as seen from where this process stands. Raises what `read_config` raises."""
        recorded = self.read_config()
        base = self.base()
        return validate(recorded if base == Path.cwd() else moved(recorded, base, Path.cwd()))

    def in_own_terms(self, config: RunConfig) -> dict[str, Any]:
        """A configuration as the run records it: plain data, its paths relative to the run's own folder of them."""
        plain = config.model_dump(mode="json")
        if self.exists() and "folder" not in self._known_record():  # no path, or a run of an earlier version
            return plain
        return moved(plain, Path.cwd(), self.base())

    def write_config(self, resolved: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
        content = {**resolved, **({RECORD: dict(record)} if record else {})}
        write_json(self.tmp, self.root / CONFIG, with_hash(content))

    def _difference(self, data: Mapping[str, Any]) -> str:
        """The fields in which a changed configuration differs from config.yaml, in words; empty without any."""
        changed = difference_to_yaml(self.root / YAML, data)
        words = [f"{name} is {old!r} here and {new!r} in {YAML}" for name, (old, new) in changed.items()]
        return f": {', '.join(words[:3])}" if words else ""

    # -- manifests ----------------------------------------------------------------------------------------------------

    def commit(self, round_: int, name: str) -> Manifest | None:
        return committed(self.folder(round_, name))

    def is_committed(self, round_: int, name: str) -> bool:
        return (self.folder(round_, name) / commits.NAME).is_file()

    def rounds_with(self, name: str) -> list[int]:
        """The rounds in which the stage is committed, ascending. Raises RunDamaged where its manifest was lost."""
        rounds = self.rounds()
        return [round_ for round_ in rounds if self.was_made(round_, name)]

    def was_made(self, round_: int, name: str) -> bool:
        """Whether the stage is committed. Raises RunDamaged where it was and its manifest is gone.

        That is so where the round has something that was made from it, or has files of it and is over.
        """
        if self.is_committed(round_, name):
            return True
        folder = self.folder(round_, name)
        commits_here = [committed(self.folder(round_, other)) for _, other in self.places([round_])]
        read = any(commit is not None and f"{round_}/{name}" in commit.inputs for commit in commits_here)
        if read or (holds_files(folder) and self._is_over(round_)):
            raise RunDamaged(f"{folder / commits.NAME} is missing. {fix_of(folder, None)}")
        return False

    def _is_over(self, round_: int) -> bool:
        """Whether a later round has begun, or the run has come to its end."""
        if any(self.is_committed(*place) for place in self.places([round_ + 1])):
            return True
        return self.events.last().get("event") == "end"

    def is_dropped(self, round_: int, name: str) -> bool:
        """True of a stage whose files were deleted on purpose."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return dropped is not None and not dropped.columns

    def dropped_columns(self, round_: int, name: str) -> tuple[str, ...]:
        """The columns that a stage's tables no longer hold, on purpose."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return dropped.columns if dropped is not None else ()

    def files_now(self, round_: int, name: str, commit: Manifest) -> dict[str, FileEntry]:
        """The files of a committed stage as they should be: as its manifest says, but for what was let go since."""
        dropped = DroppedFiles.load(self.folder(round_, name))
        return {**commit.files, **(dropped.files if dropped is not None else {})}

    def commit_hash(self, round_: int, name: str) -> str:
        """SHA-256 of a stage's manifest, which covers all inputs; empty if it is not committed."""
        return sha256_of(self.folder(round_, name) / commits.NAME) if self.is_committed(round_, name) else ""

    def seal(self, commit: Manifest, name: str) -> None:
        """Commits the stage, whose files all lie in its folder, durably."""
        commit.save(self.folder(commit.round, name), self.tmp)

    def places(self, rounds: Sequence[int] | None = None) -> Iterator[tuple[int, str]]:
        """Every folder that a stage has written, by round and name: what is committed, and all of a round's own."""
        for round_ in self.rounds() if rounds is None else rounds:
            base = self.root / f"round-{round_:04d}"
            if not base.is_dir():
                continue
            committed = (path.parent.relative_to(base).as_posix() for path in sorted(base.rglob(commits.NAME)))
            own = (path.name for path in sorted(base.iterdir()) if path.is_dir())
            yield from ((round_, name) for name in dict.fromkeys([*committed, *own]))

    def faults(self, without: Collection[tuple[int, str]] = ()) -> list[str]:
        """What is damaged, a line each: changed or missing files, then manifests whose inputs have been replaced.

        Stages in `without` are passed over. Raises RunTooNew.
        """
        places = [place for place in self.places() if place not in without]
        damaged = [fault for place in places for fault in self._damage(*place)]
        return damaged + [fault for place in places for fault in self._replaced(*place)]

    def faults_of(self, round_: int, name: str) -> list[str]:
        """What is damaged in one stage's folder, a line each. Raises RunTooNew."""
        return self._damage(round_, name) + self._replaced(round_, name)

    def _damage(self, round_: int, name: str) -> list[str]:
        """What of the stage's own files is not as it was committed."""
        folder = self.folder(round_, name)
        try:
            commit, dropped = Manifest.load(folder), DroppedFiles.load(folder)
        except RunDamaged as error:
            return [str(error).split(". ")[0]]
        return commit.faults(folder, dropped) if commit is not None else []

    def _replaced(self, round_: int, name: str) -> list[str]:
        """Which of the stages that it was made from are no longer what they were."""
        folder = self.folder(round_, name)
        try:
            commit = Manifest.load(folder)
        except RunDamaged:
            return []
        reads = commit.inputs.items() if commit is not None else ()
        gone = [read for read, expected in reads if self.commit_hash(*parted(read)) != expected]
        return [f"{folder} was made from another {read} than the one on disk" for read in gone]

    def supersede(self, round_: int, name: str) -> None:
        """Moves a stage aside, to superseded/: nothing that was generated is ever deleted.

        Stages in folders below it stay. Its manifest goes first, so that a kill leaves a stage that is not committed.
        """
        folder = self.folder(round_, name)
        if not folder.is_dir():
            return
        target = unique(self.root / "superseded", f"-round-{round_:04d}-{name.replace('/', '-')}")
        nested = {path.relative_to(folder).parts[0] for path in folder.glob(f"*/**/{commits.NAME}")}
        own = [path for path in folder.iterdir() if path.name not in nested]
        with explaining(folder):
            if own:
                ensure_folder(target)
            for path in sorted(own, key=lambda path: path.name != commits.NAME):
                path.rename(target / path.name)
            if not nested:
                folder.rmdir()
            sync(*([target] if own else []), folder if nested else folder.parent)

    def clear(self, round_: int, name: str) -> None:
        """Removes what an interrupted stage left in its folder."""
        discard(self.folder(round_, name), self.tmp)

    # -- the lock ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; what an earlier holder left under tmp/ is removed.

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
                self._empty_tmp()
                yield
            finally:
                lock.release()

    def _empty_tmp(self) -> None:
        shutil.rmtree(self.tmp, ignore_errors=True)
        self.tmp.mkdir(exist_ok=True)


def holds_files(folder: Path) -> bool:
    """Whether a stage has left anything in its folder."""
    return folder.is_dir() and any(path.is_file() and not is_own(path.name) for path in folder.iterdir())


def difference_to_yaml(path: Path, data: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of a resolved configuration that a YAML file gives another value, with both values.

    Empty where the file cannot be read.
    """
    try:
        asked = validate(read_yaml(path)).model_dump(mode="json") | {"output_dir": None}
    except ConfigError:
        return {}
    plain = {name: value for name, value in data.items() if name not in (SELF, RECORD)}
    folder = data.get(RECORD, {}).get("folder") if isinstance(data.get(RECORD), dict) else None
    if isinstance(folder, str):
        asked = moved(asked, Path.cwd(), path.parent / folder)
    return differences(plain, asked)


def parted(read: str) -> tuple[int, str]:
    """The round and the folder of an input as a manifest names it: 1/generate."""
    round_, name = read.split("/", 1)
    return int(round_), name
