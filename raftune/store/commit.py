"""A COMMIT says what a stage wrote, and from what: state is derived from these files, and from nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raftune.errors import RunDamaged, RunTooNew
from raftune.store.files import json_bytes, publish_seal, sha256_of, stage_file

NAME = "_COMMIT.json"  # the underscore keeps readers of a folder of Parquet files from opening it
LAYOUT = 1


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
class Commit:
    """What a stage wrote. `key` depends on the fields that shape the stage and on the COMMITs it was made from."""

    stage: str
    round: int
    key: str
    fields: Mapping[str, Any]
    inputs: Mapping[str, str]
    files: Mapping[str, FileEntry]
    quarantined: Mapping[str, str] = field(default_factory=dict)

    def save(self, folder: Path, tmp: Path) -> None:
        """Publishes the COMMIT in the stage's folder, after everything that it lists."""
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
            staged.write_bytes(json_bytes(content))

    @classmethod
    def load(cls, folder: Path) -> Commit | None:
        """The folder's COMMIT, or None where there is none. Raises RunDamaged, RunTooNew."""
        path = folder / NAME
        try:
            data = json.loads(path.read_bytes())
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
        try:
            files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            return cls(
                data["stage"], data["round"], data["key"], data["fields"], data["inputs"], files, data["quarantined"]
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RunDamaged(f"{path} lacks {error}. Restore it, or redo its stage with `--from`.") from error

    def faults(self, folder: Path, since: Mapping[str, FileEntry] | None = None) -> list[str]:
        """What differs between the folder and this COMMIT, a line each; none when all is as it was committed.

        `since` are files that were replaced on purpose, as they are now: each may be as it was, or as it says there.
        """
        found = []
        for name, entry in sorted(self.files.items()):
            path = folder / name
            known = [entry, *([since[name]] if since and name in since else [])]
            if not path.is_file():
                found.append(f"{path} is missing")
            elif (size := path.stat().st_size) not in [one.bytes for one in known]:
                found.append(f"{path} has {size} bytes; {known[-1].bytes} were committed")
            elif sha256_of(path) not in [one.sha256 for one in known]:
                found.append(f"{path} has changed since it was committed (its SHA-256 differs)")
        return found


def _entry_json(entry: FileEntry) -> dict[str, Any]:
    pairs = {"bytes": entry.bytes, "sha256": entry.sha256, "rows": entry.rows}
    return {name: value for name, value in pairs.items() if value is not None}


def stage_key(stage: str, fields: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The hash that tells whether a stage's output belongs to these fields and these inputs."""
    text = json.dumps({"stage": stage, "fields": fields, "inputs": inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
