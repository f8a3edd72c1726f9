"""Reads a run for a report. What cannot be read is noted on the page."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.errors import RaftuneError, RunDamaged
from raftune.sanitize import first_line
from raftune.store.commit import MARKER, Manifest, has_changed, surplus
from raftune.store.files import sha256_hex
from raftune.store.layout import chunk_file
from raftune.store.parquet import column_names, read_groups, read_metadata, read_table
from raftune.store.run import CONFIG, RunFolder

_CHUNK = re.compile(r"chunk-(\d{5,})\.parquet")
CHUNKS = "raftune.units"  # in the metadata of verdicts.parquet: the chunk of each of its row groups

TIMED = ("stage_begin", "stage_end", "stage_stop", "chunk", "end")  # events that a page reads


@dataclass(frozen=True, slots=True, order=True)
class StageFile:
    """A file of a stage."""

    round: int
    stage: str
    file: str

    def __str__(self) -> str:
        return f"round-{self.round:04d}/{self.stage}/{self.file}"


class RunReader:
    """The committed stages of a run; `missing` names, by round and stage, what could not be shown.

    A run may be at work while it is read: a file that vanishes between two looks is noted like any other.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.missing: list[str] = []
        self._bad: set[Path] = set()
        self._read: dict[Path, Any] = {}  # JSON files, which several parts of the page ask for
        self.pictures: dict[str, StageFile] = {}  # where those lie that rows which were read have named
        self.commits = dict(self._load_commits())
        self._lost: set[tuple[int, str]] = set()  # stages without a manifest from which something was made
        self._check_files()
        self.config = self._read_config()
        self.events = list(self._read_events())
        self._check_stages()

    def note(self, where: str, why: str) -> None:
        """Puts down, once, what is missing; paths into the run are shortened, for the page may be sent to others."""
        line = f"{where}: {why}".replace(f"{self.run.root}/", "")
        if line not in self.missing:
            self.missing.append(line)

    def has(self, round_: int, stage: str) -> bool:
        """Whether the stage is committed, or was: something committed was made from it."""
        return (round_, stage) in self.commits or (round_, stage) in self._lost

    def rounds(self, stage: str) -> list[int]:
        """The rounds that have this stage, ascending."""
        return [round_ for round_ in self.run.rounds() if self.has(round_, stage)]

    # -- files --------------------------------------------------------------------------------------------------------

    def json(self, round_: int, stage: str, name: str, kind: type[Any] = dict) -> Any:
        """The file's dictionary (or list); an empty one where the stage is not there or the file cannot be read."""
        if not self.has(round_, stage):
            return kind()
        commit = self.commits.get((round_, stage))
        entry = commit.files.get(name) if commit is not None else None
        path = self.run.folder(round_, stage) / name
        return self._json(path, f"round {round_}, {stage}", kind, entry.sha256 if entry is not None else None)

    def own_json(self, name: str) -> dict[str, Any]:
        """A JSON file at the run's top; empty where there is none or it cannot be read."""
        path, sha256 = self.run.root / name, None
        with contextlib.suppress(RaftuneError, OSError, AttributeError):
            sha256 = self.run.config_record().get("files", {}).get(name)  # of files written with the configuration
        if not path.is_file():
            return {}
        content: dict[str, Any] = self._json(path, "the run", dict, sha256 if isinstance(sha256, str) else None)
        return content

    def _json(self, path: Path, where: str, kind: type[Any], sha256: str | None) -> Any:
        """The file's content; Parquet has checksums of its own, of JSON the committed hash is compared."""
        if path in self._bad:
            return kind()
        if isinstance(self._read.get(path), kind):
            return self._read[path]
        try:
            content = path.read_bytes()
            value = json.loads(content)
        except FileNotFoundError:
            fault = "is missing"
        except (OSError, ValueError) as error:
            fault = f"cannot be read: {first_line(error)}"
        else:
            if sha256 is not None and sha256_hex([content]) != sha256:
                fault = "has changed since it was committed"
            elif sha256 is None and isinstance(value, dict) and has_changed(value):
                fault = "has changed since it was written"
            elif not isinstance(value, kind):
                fault = f"holds {type(value).__name__}, not {kind.__name__}"
            else:
                self._read[path] = value
                return value
        self._bad.add(path)
        self.note(where, f"{path.name} {fault}")
        return kind()

    def names(self, round_: int, stage: str, name: str) -> list[str]:
        """The names of the file's columns; none where it cannot be read."""
        path = self.run.folder(round_, stage) / name
        if path not in self._bad and path.is_file():
            with self._noting(round_, stage, path):
                return column_names(path)
        return []

    def chunk(self, round_: int, stage: str, chunk: int, columns: Sequence[str] | None = None) -> pa.Table | None:
        """The chunk's table, with those of these columns that it has, or with all; None where it cannot be read."""
        path = self.run.folder(round_, stage) / chunk_file(chunk)
        if path not in self._bad and path.is_file() and (columns is None or self.has(round_, stage)):
            with self._noting(round_, stage, path):
                return read_table(path, columns)
        return None

    def groups(self, round_: int, stage: str, name: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The file's row groups, as far as they can be read; columns that it lacks are left out."""
        path = self.run.folder(round_, stage) / name
        if self.has(round_, stage) and path not in self._bad:
            with self._noting(round_, stage, path):
                yield from read_groups(path, columns)

    @contextlib.contextmanager
    def _noting(self, round_: int, stage: str, path: Path) -> Iterator[None]:
        """Notes what is wrong with a file that cannot be read, which is then not read again."""
        try:
            yield
        except RaftuneError as error:
            self._damaged(round_, stage, path, finding(error, path))

    def _damaged(self, round_: int, stage: str, path: Path, fault: str) -> None:
        self._bad.add(path)
        self.note(f"round {round_}, {stage}", fault)

    # -- chunks -------------------------------------------------------------------------------------------------------

    def chunks(self, round_: int, stage: str) -> list[int]:
        """The chunks of a stage, ascending."""
        if not self.has(round_, stage):
            return []
        commit, folder = self.commits.get((round_, stage)), self.run.folder(round_, stage)
        listed = (path.name for path in folder.glob("chunk-*")) if commit is None else commit.files
        names = [name for name in listed if (folder / name).is_file()]
        return sorted(int(match[1]) for name in names if (match := _CHUNK.fullmatch(name)))

    def verdicts(self, round_: int, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Each chunk that was selected from, with these columns of its verdicts."""
        path = self.run.folder(round_, "select") / "verdicts.parquet"
        if self.has(round_, "select") and path not in self._bad:
            with self._noting(round_, "select", path):
                try:
                    chunks = json.loads(read_metadata(path)[1][CHUNKS])
                except (KeyError, ValueError) as error:
                    raise RunDamaged(f"{path} does not name its chunks") from error
                yield from zip(chunks, self.groups(round_, "select", path.name, columns), strict=False)

    def prompts(self, round_: int, plan: str, chunks: set[int]) -> dict[str, Any]:
        """The prompts of these chunks by their ids."""
        texts: dict[str, Any] = {}
        for chunk, table in enumerate(self.groups(round_, plan, "prompts.parquet", ["prompt_id", "prompt"])):
            if chunk in chunks:
                texts |= zip(table.column("prompt_id").to_pylist(), table.column("prompt").to_pylist(), strict=True)
        return texts

    @cached_property
    def pictured(self) -> bool:
        """Whether the answers are images, by the first file of answers that can be read."""
        for stage in ("generate", "evaluate/generate"):
            for round_ in self.rounds(stage):
                for chunk in self.chunks(round_, stage):
                    names = self.names(round_, stage, chunk_file(chunk))
                    if names:
                        return "image_sha256" in names
        return False

    # -- what is there ------------------------------------------------------------------------------------------------

    def _load_commits(self) -> Iterator[tuple[tuple[int, str], Manifest]]:
        for round_, stage in self.run.places():
            with self._noting(round_, stage, self.run.folder(round_, stage) / "_COMMIT.json"):
                if (commit := self.run.commit(round_, stage)) is not None:
                    yield (round_, stage), commit

    def _read_config(self) -> dict[str, Any]:
        try:
            return self.run.read_config()
        except (RaftuneError, OSError) as error:
            self.note("the run", finding(error, self.run.root / CONFIG))
            return {}

    def _read_events(self) -> Iterator[dict[str, Any]]:
        """The times of stages and the end of the run, which is all that a report needs of the record."""
        try:
            for event in self.run.events:
                if isinstance(event, dict) and event.get("event") in TIMED:
                    yield event
        except OSError as error:
            self.note("the run", f"events.jsonl cannot be read: {first_line(error)}")

    def _check_files(self) -> None:
        """Notes manifests that are gone although others were made from them, and files that are gone or cut.

        By names and sizes only: what the page shows is compared with its hash as it is read.
        """
        for commit in self.commits.values():
            for name in commit.inputs:
                number, _, stage = name.partition("/")
                if number.isdigit() and (int(number), stage) not in self.commits:
                    self._lost.add((int(number), stage))
        for round_, stage in sorted(self._lost):
            self._note_lost(round_, stage, "the files in its folder are shown")
        for (round_, stage), commit in self.commits.items():
            folder = self.run.folder(round_, stage)
            with self._noting(round_, stage, folder / MARKER):
                if self.run.is_dropped(round_, stage):
                    continue
                for name, entry in sorted(self.run.files_now(round_, stage, commit).items()):
                    path = folder / name
                    size = path.stat().st_size if path.is_file() else None
                    if size != entry.bytes:
                        cut = f"has {size:,} bytes; {entry.bytes:,} were committed" if size is not None else ""
                        self._damaged(round_, stage, path, f"{name} {cut or 'is missing'}")
                for name in surplus(folder, commit):
                    self.note(f"round {round_}, {stage}", f"{name} was not committed and is passed over")

    def _check_stages(self) -> None:
        """Notes what a round that is over must have, and what every run has at its top."""
        evaluation, guards = (self.config.get(name) for name in ("evaluation", "guards"))
        started = sorted({round_ for round_, _ in self.commits})
        over = started if self.ended() else started[:-1]  # after each of them another round began
        for round_ in over:  # those of its stages on which nothing in it depends, so that no other would miss them
            stages = ["rows", "model"] if round_ else ["model"]
            if isinstance(evaluation, dict) and evaluation.get("num_prompts"):
                stages.append("evaluate")
            if isinstance(guards, dict) and guards.get("enabled") and round_:
                stages.append("guard")
            for stage in stages:
                if not self.has(round_, stage):
                    self._note_lost(round_, stage, "the round is over")
        for name in ("config.yaml", "environment.json", "events.jsonl", *(["best.json"] if self.ended() else [])):
            if over and not (self.run.root / name).is_file():
                self.note("the run", f"{name} is missing")

    def _note_lost(self, round_: int, stage: str, why: str) -> None:
        where = f"round {round_}, {stage}"
        if not any(line.startswith(f"{where}: ") for line in self.missing):
            self.note(where, f"its COMMIT is missing; {why}")

    def ended(self) -> bool:
        """Whether the run came to its end, and nothing was done since."""
        return bool(self.events) and self.events[-1]["event"] == "end"


def finding(error: Exception, path: Path) -> str:
    """The error's finding about a file, under the file's name alone and without the advice."""
    return str(error).replace(str(path), path.name).split(". ")[0].rstrip(".")
