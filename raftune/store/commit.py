"""Manifests (`_COMMIT.json`): the files that a stage wrote and what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raftune.errors import RunDamaged, RunTooNew, RunTooOld
from raftune.store.files import json_bytes, publish_seal, sha256_of, stage_file, write_json

# The underscore keeps readers of a folder of Parquet files from opening these.
NAME = "_COMMIT.json"
JOURNAL = "_journal.jsonl"  # of an interrupted stage
MARKER = "DROPPED.json"  # what was let go on purpose
LAYOUT = 2  # 1: raftune 0.1, whose stages were called draw and tune, and its section tuning
SELF = "sha256"  # of all else that a file of ours holds
_ROUND = re.compile(r"round-(\d{4,})")
_OF_SYSTEMS = ("Thumbs.db", "desktop.ini")


def is_own(name: str) -> bool:
    """Whether a file in a committed folder is the store's own, or one that a file browser leaves behind."""
    base = name.rpartition("/")[2]
    return name in (NAME, JOURNAL, MARKER) or base.startswith(".") or base in _OF_SYSTEMS


def with_hash(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the hash of itself, by which `has_changed` sees an edit."""
    return {**content, SELF: hashlib.sha256(json_bytes(content)).hexdigest()}


def has_changed(content: Mapping[str, Any]) -> bool:
    """Whether the content is not what `with_hash` wrote. Content without a hash is not."""
    rest = {name: value for name, value in content.items() if name != SELF}
    return content.get(SELF) != hashlib.sha256(json_bytes(rest)).hexdigest()


def too_old(path: Path) -> RunTooOld:
    """The error for a file of a run that raftune 0.1 wrote."""
    return RunTooOld(
        f"{path} was written by raftune 0.1, whose stages and fields have other names. Read this run with raftune 0.1 "
        "(pip install 'raftune<0.2'), or train anew."
    )


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a stage: its size in bytes, its SHA-256, its rows where it is a table."""

    bytes: int
    sha256: str
    rows: int | None = None

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """The entry of a file as it lies on disk now."""
        return cls(path.stat().st_size, sha256_of(path))


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a stage wrote. `key` depends on the fields that shape the stage and on the manifests it was made from."""

    stage: str
    round: int
    key: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    quarantined: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path, tmp: Path) -> None:
        """Publishes the manifest in the stage's folder, after everything that it lists."""
        content = {
            "layout": LAYOUT,
            "stage": self.stage,
            "round": self.round,
            "key": self.key,
            "fields": dict(self.fields),
            "inputs": dict(self.inputs),
            "files": {name: _entry_json(e) for name, e in self.files.items()},
            "quarantined": dict(self.quarantined),
        }
        with stage_file(tmp, folder / NAME, lambda staged, final: publish_seal(staged, final, self.files)) as staged:
            staged.write_bytes(json_bytes(with_hash(content)))

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """The folder's manifest, or None where there is none. Raises RunDamaged, RunTooNew, RunTooOld."""
        path = folder / NAME
        try:
            raw = path.read_bytes()
            data = json.loads(raw)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunDamaged(f"{path} is not valid JSON. Restore it, or redo its stage with `--from`.") from error
        if not isinstance(data, dict) or not isinstance(data.get("layout"), int):
            raise RunDamaged(f"{path} lacks its layout number. Restore it, or redo its stage with `--from`.")
        if data["layout"] > LAYOUT:
            raise RunTooNew(
                f"{path} has layout {data['layout']}; this version reads up to {LAYOUT}. "
                "Upgrade raftune to read this run."
            )
        if data["layout"] < LAYOUT:
            raise too_old(path)
        if raw != json_bytes(data) or has_changed(data):
            raise RunDamaged(f"{path} has changed since it was committed. Restore it, or redo its stage with `--from`.")
        if (lies_in := round_of(folder)) is not None and data.get("round") != lies_in:
            raise RunDamaged(f"{path} is of round {data.get('round')}. Restore it, or redo its stage with `--from`.")
        try:
            files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            return cls(
                data["stage"], data["round"], data["key"], data["fields"], data["inputs"], files, data["quarantined"]
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RunDamaged(f"{path} lacks {error}. Restore it, or redo its stage with `--from`.") from error

    def faults(self, folder: Path, dropped: DroppedFiles | None = None) -> list[str]:
        """What differs between the folder and this manifest, a line each; none when all is as it was committed.

        Of files that were replaced on purpose each may be as it was, or as `dropped` says; where whole files were let
        go none is missed.
        """
        found = []
        since = dropped.files if dropped is not None else {}
        if stage_key(self.stage, self.fields, self.inputs) != self.key:
            found.append(f"{folder / NAME} has a key that is not that of its fields and inputs")
        for name, entry in sorted(self.files.items()):
            path = folder / name
            known = [entry, *([since[name]] if name in since else [])]
            if not path.is_file():
                if dropped is None or dropped.columns:
                    found.append(f"{path} is missing")
            elif (size := path.stat().st_size) not in [one.bytes for one in known]:
                found.append(f"{path} has {size} bytes; {known[-1].bytes} were committed")
            elif sha256_of(path) not in [one.sha256 for one in known]:
                found.append(f"{path} has changed since it was committed (its SHA-256 differs)")
        return found + [
            f"{folder / name} was not committed: move it out of the folder" for name in surplus(folder, self)
        ]


def round_of(folder: Path) -> int | None:
    """The round that a stage's folder lies in, by its path."""
    named = [match for part in folder.parts if (match := _ROUND.fullmatch(part))]
    return int(named[-1][1]) if named else None


def surplus(folder: Path, commit: Manifest) -> list[str]:
    """Files in a committed folder that its manifest does not list; those of stages in folders below are their own."""
    return sorted(name for name in _files_below(folder) if name not in commit.files and not is_own(name))


def _files_below(folder: Path, prefix: str = "") -> Iterator[str]:
    for entry in os.scandir(folder):
        if not entry.is_dir(follow_symlinks=False):
            yield prefix + entry.name
        elif prefix or not (folder.name == "evaluate" or Path(entry.path, NAME).is_file()):
            yield from _files_below(Path(entry.path), f"{prefix}{entry.name}/")


def _entry_json(entry: FileEntry) -> dict[str, Any]:
    pairs = {"bytes": entry.bytes, "sha256": entry.sha256, "rows": entry.rows}
    return {name: value for name, value in pairs.items() if value is not None}


def stage_key(stage: str, fields: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The hash that tells whether a stage's output belongs to these fields and these inputs."""
    plain = json.loads(json.dumps({"stage": stage, "fields": fields, "inputs": inputs}, default=str))
    text = json.dumps(plain, sort_keys=True)  # the same of what was read back from a manifest
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class DroppedFiles:
    """`columns` are gone from the files, which are `files` since; none says that whole files are gone."""

    why: str
    columns: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> DroppedFiles | None:
        """What the folder's marker says, None without one. Raises RunDamaged."""
        path = folder / MARKER
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
            if has_changed(found):
                raise ValueError
            files = {name: FileEntry(**entry) for name, entry in found.get("files", {}).items()}
            return cls(str(found.get("why", "")), tuple(found.get("columns", ())), files)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunDamaged(f"{path} does not say what was dropped. Restore it, or redo its stage.") from error

    def save(self, folder: Path, tmp: Path) -> None:
        content: dict[str, Any] = {"why": self.why}
        if self.columns:
            files = {name: asdict(entry) for name, entry in self.files.items()}
            content |= {"columns": list(self.columns), "files": files}
        write_json(tmp, folder / MARKER, with_hash(content))
