"""Manifests (`_COMMIT.json`): the files that a stage wrote and what they were made from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raftune.errors import RunDamaged, RunTooNew, RunTooOld
from raftune.store.files import json_bytes, publish_seal, sha256_hex, sha256_of, stage_file, write_json

# The underscore keeps readers of a folder of Parquet files from opening these.
NAME = "_COMMIT.json"
JOURNAL = "_journal.jsonl"  # of an interrupted stage
MARKER = "DROPPED.json"  # lists what was deleted on purpose
LAYOUT = 3
WRITTEN_BY = {1: "raftune 0.1", 2: "a development version of raftune 0.2"}  # earlier layouts
SELF = "sha256"  # of the rest of a JSON file's content
ROUND = re.compile(r"round-(\d{4,})")


def is_own(name: str) -> bool:
    """Whether a file in a committed folder is the store's own, or one that a file browser leaves behind."""
    base = name.rpartition("/")[2]
    return name in (NAME, JOURNAL, MARKER) or base.startswith(".") or base in ("Thumbs.db", "desktop.ini")


def with_hash(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its own hash, by which `has_changed` detects an edit."""
    return {**content, SELF: sha256_hex([json_bytes(content)])}


def has_changed(content: Mapping[str, Any], *fields: str) -> bool:
    """Whether the content is not what `with_hash` wrote; true of content without a hash, and of content that lacks one
    of the file's `fields`: another file's, whose hash is right.
    """
    rest = {name: value for name, value in content.items() if name != SELF}
    return not rest.keys() >= set(fields) or content != with_hash(rest)


def too_old(path: Path, layout: int = 1) -> RunTooOld:
    """The error for a file of a run of an earlier layout."""
    version = WRITTEN_BY.get(layout, f"a version with layout {layout}")
    return RunTooOld(
        f"{path} was written by {version}, whose stages and fields have other names. Read this run with that version, "
        "or train anew."
    )


def round_above(folder: Path) -> Path | None:
    """The folder of the round that a stage's folder lies in."""
    return next((parent for parent in folder.parents if ROUND.fullmatch(parent.name)), None)


def folder_of(stage: str) -> str:
    """The folder of a round that a stage of this name writes."""
    return {"start": "model", "train": "model", "gather": "rows"}.get(stage, stage.replace("evaluation ", "evaluate/"))


def stage_of(folder: str) -> str:
    """The name of a chunked stage that writes this folder of a round."""
    return folder.replace("evaluate/", "evaluation ")


def stage_key(stage: str, fields: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The hash that tells whether a stage's output belongs to these fields and these inputs."""
    plain = json.loads(json.dumps({"stage": stage, "fields": fields, "inputs": inputs}, default=str))
    return sha256_hex([json.dumps(plain, sort_keys=True)])  # equal to that of a manifest that was read back


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a stage: its size in bytes, its SHA-256, its rows where it is a table."""

    bytes: int
    sha256: str
    rows: int | None = None

    @classmethod
    def of(cls, path: Path, rows: int | None = None) -> FileEntry:
        """The entry of a file on disk."""
        return cls(path.stat().st_size, sha256_of(path), rows)


@dataclass(frozen=True)
class DroppedFiles:
    """What was deleted on purpose: these columns of the files listed, or, without columns, whole files."""

    why: str
    columns: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> DroppedFiles | None:
        """The content of the folder's marker, None without one. Raises RunDamaged."""
        path = folder / MARKER
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_bytes())
            if has_changed(content, "why"):
                raise ValueError
            files = {name: FileEntry(**entry) for name, entry in content.get("files", {}).items()}
            return cls(str(content.get("why", "")), tuple(content.get("columns", ())), files)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunDamaged(f"{path} does not say what was dropped. Restore it, or redo its stage.") from error

    def save(self, folder: Path, tmp: Path) -> None:
        content: dict[str, Any] = {"why": self.why}
        if self.columns:
            files = {name: asdict(entry) for name, entry in self.files.items()}
            content |= {"columns": list(self.columns), "files": files}
        write_json(tmp, folder / MARKER, with_hash(content))


@dataclass(frozen=True)
class Manifest:
    """What a stage wrote. `key` depends on the fields that shape the stage and on the manifests it was made from.

    `reproducible`: whether running the stage again gives the same bytes; written only where it does not.
    """

    stage: str
    round: int
    key: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    quarantined: Mapping[str, str] = field(default_factory=dict)
    reproducible: bool = True

    def save(self, folder: Path, tmp: Path) -> None:
        """Publishes the manifest in the stage's folder, after everything that it lists."""
        files = {name: {k: v for k, v in asdict(e).items() if v is not None} for name, e in self.files.items()}
        plain = {"layout": LAYOUT, **vars(self), "files": files}
        if self.reproducible:
            del plain["reproducible"]
        content = with_hash(plain)
        with stage_file(tmp, folder / NAME, lambda staged, final: publish_seal(staged, final, self.files)) as staged:
            staged.write_bytes(json_bytes(content))

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where there is none. Raises RunDamaged, RunTooNew, RunTooOld."""
        path = folder / NAME

        def damaged(words: str) -> RunDamaged:
            return RunDamaged(f"{path} {words}. Restore it, or redo its stage with `--from`.")

        try:
            raw = path.read_bytes()
            data = json.loads(raw)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise damaged("is not valid JSON") from error
        if not isinstance(data, dict) or not isinstance(data.get("layout"), int):
            raise damaged("lacks its layout number")
        if data["layout"] > LAYOUT:
            raise RunTooNew(
                f"{path} has layout {data['layout']}; this version reads up to {LAYOUT}. "
                "Upgrade raftune to read this run."
            )
        if data["layout"] < LAYOUT:
            raise too_old(path, data["layout"])
        if raw != json_bytes(data) or has_changed(data):
            raise damaged("has changed since it was committed")
        above = round_above(folder)
        if above is not None and data.get("round") != int(above.name.removeprefix("round-")):
            raise damaged(f"is of round {data.get('round')}")
        stage = str(data.get("stage"))
        if above is not None and folder.relative_to(above).as_posix() != folder_of(stage):
            raise damaged(f"is of another stage: {stage}")
        try:
            files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            names = ("stage", "round", "key", "fields", "inputs", "quarantined")
            return cls(files=files, reproducible=data.get("reproducible", True), **{name: data[name] for name in names})
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(f"lacks {error}") from error

    def fault_of(
        self, folder: Path, name: str, dropped: DroppedFiles | None, hash_of: Callable[[Path], str] = sha256_of
    ) -> str:
        """How a listed file differs from what was committed, and from what it became when columns were dropped."""
        entries = [self.files[name], *([dropped.files[name]] if dropped and name in dropped.files else [])]
        return file_fault(folder / name, entries, hash_of)

    def faults(self, folder: Path, dropped: DroppedFiles | None = None) -> list[str]:
        """What differs between the folder and this manifest, a line each; none when all is as it was committed.

        Files that were replaced on purpose may be as committed or as `dropped` lists them; where whole files were
        dropped, missing ones are no fault.
        """
        faults = []
        if stage_key(self.stage, self.fields, self.inputs) != self.key:
            faults.append(f"{folder / NAME} has a key that is not that of its fields and inputs")
        for name in self.present(folder, dropped):
            faults += filter(None, [self.fault_of(folder, name, dropped)])
        return faults + [
            f"{folder / name} was not committed: move it out of the folder" for name in surplus(folder, self)
        ]

    def present(self, folder: Path, dropped: DroppedFiles | None) -> list[str]:
        """The names of the files that must be in the folder, and of dropped ones that still are."""
        gone = dropped is not None and not dropped.columns
        return [name for name in sorted(self.files) if not gone or (folder / name).is_file()]


def file_fault(path: Path, entries: list[FileEntry], hash_of: Callable[[Path], str] = sha256_of) -> str:
    """How a file differs from each of its known entries; empty where it equals one."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) not in [entry.bytes for entry in entries]:
        return f"{path} has {size} bytes; {entries[-1].bytes} were committed"
    if hash_of(path) not in [entry.sha256 for entry in entries]:
        return f"{path} has changed since it was committed (its SHA-256 differs)"
    return ""


def surplus(folder: Path, commit: Manifest) -> list[str]:
    """Files in a committed folder that its manifest does not list, without those of other stages in folders below."""
    return sorted(name for name in _files_below(folder) if name not in commit.files and not is_own(name))


def _files_below(folder: Path, prefix: str = "") -> Iterator[str]:
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False):
            yield prefix + entry.name
        elif prefix or not (folder.name == "evaluate" or Path(entry.path, NAME).is_file()):
            yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/")
