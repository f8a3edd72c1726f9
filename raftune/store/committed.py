"""Reads committed files after checking them against their manifest.

A file is hashed once in a process, and again when its size, time or inode has changed. Files that the process committed
itself count as checked. Files that no manifest lists are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from raftune.errors import RunDamaged
from raftune.sanitize import shell_command
from raftune.store.commit import (
    MARKER,
    NAME,
    ROUND,
    DroppedFiles,
    FileEntry,
    Manifest,
    file_fault,
    has_changed,
    round_above,
    surplus,
    with_hash,
)
from raftune.store.files import json_bytes, sha256_of

MANIFEST = "raftune_files.json"
# The list itself, what people edit, and what is deleted before a model is given away.
UNLISTED = (MANIFEST, "README.md", "parity.json")
_DEEPEST = 4  # folders between a committed file and its manifest: those of a pipeline's parts
_MOST = 200_000  # files remembered
_SMALL = 50_000_000  # bytes: below, threads cost more than they save
Signature = tuple[int, int, int]

_hashes: dict[Path, tuple[Signature, str]] = {}


def check_file(path: Path) -> Path:
    """The path, after its content was compared with its manifest. Raises RunDamaged that names file and fix."""
    folder, commit = _covering(path)
    if commit is None:
        return path
    name = path.relative_to(folder).as_posix()
    if name not in commit.files:
        raise RunDamaged(_not_listed(folder, name))
    if fault := commit.fault_of(folder, name, _dropped(folder), _cached_hash):
        raise RunDamaged(f"{fault}. {fix_of(folder, commit)}")
    return path


def check_folder(folder: Path) -> Path:
    """The folder, after all that its manifest lists was compared and nothing else found in it. Raises RunDamaged.

    Files dropped on purpose may be missing. A published model folder has a list of files instead, which permits
    additions. Without either there is nothing to compare.
    """
    commit, dropped = committed(folder), _dropped(folder)
    if commit is None:
        check_manifest(folder)
        return folder
    if unlisted := surplus(folder, commit):
        raise RunDamaged(_not_listed(folder, unlisted[0]))
    names = commit.present(folder, dropped)

    def fault_of(name: str) -> str:
        return commit.fault_of(folder, name, dropped, _cached_hash)

    if sum(commit.files[name].bytes for name in names) < _SMALL:
        faults = list(map(fault_of, names))
    else:
        with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
            faults = list(pool.map(fault_of, names))
    if fault := next(filter(None, faults), None):
        raise RunDamaged(f"{fault}. {fix_of(folder, commit)}")
    return folder


def signatures(folder: Path) -> dict[str, Signature]:
    """Size, time and inode of every file below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    pairs = ((path.relative_to(folder).as_posix(), _signature(path)) for path in paths)
    return {name: signature for name, signature in pairs if signature is not None}


def write_manifest(folder: Path, before: Mapping[str, Signature] | None = None) -> None:
    """Lists a finished model folder's files with their hashes, which `check_folder` compares when it is loaded.

    Files whose signature is as in `before` were not written by this process and are left out.
    """
    before, files = before or {}, {}
    for name, signature in signatures(folder).items():
        if signature != before.get(name) and name not in UNLISTED and not name.startswith("."):
            entry = asdict(FileEntry.of(folder / name))
            del entry["rows"]
            files[name] = entry
    (folder / MANIFEST).write_bytes(json_bytes(with_hash({"files": files})))


def check_manifest(folder: Path) -> None:
    """Raises RunDamaged for the first file that differs from the model folder's list of files, if it has one."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    fix = f"Fetch or export it again; if you changed it on purpose, delete {path}."
    try:
        content = json.loads(path.read_bytes())
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDamaged(f"{path} does not list the folder's files. {fix}") from error
    if has_changed(content):
        raise RunDamaged(f"{path} has changed since it was written. {fix}")
    for name, entry in files.items():
        if fault := file_fault(folder / name, [entry], _cached_hash):
            raise RunDamaged(f"{fault.replace('committed', 'written')}. {fix}")


def read_json(path: Path) -> Any:
    """The content of a JSON file, checked. Raises RunDamaged, also where it is missing."""
    try:
        return json.loads(check_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDamaged(f"{path} is missing. {fix_of(path.parent)}") from error
    except ValueError as error:
        raise RunDamaged(f"{path} is not valid JSON. {fix_of(path.parent)}") from error


def committed(folder: Path) -> Manifest | None:
    """The folder's manifest, None without one; read anew only where it has changed. Raises RunDamaged, RunTooNew."""
    signature = _signature(folder / NAME)
    return None if signature is None else _load(Manifest, folder, signature)


def is_listed(path: Path) -> bool:
    """Whether a manifest lists this file."""
    folder, commit = _covering(path)
    return commit is not None and path.relative_to(folder).as_posix() in commit.files


def remember(folder: Path, files: Iterable[tuple[str, FileEntry]]) -> None:
    """Counts files as checked that this process hashed as it wrote them."""
    for name, entry in files:
        if (signature := _signature(folder / name)) is not None:
            _keep(folder / name, signature, entry.sha256)


def fix_of(folder: Path, commit: Manifest | None = None) -> str:
    """How to repair a committed folder, in words."""
    if (above := round_above(folder)) is None:
        return "Restore it, or write the folder anew."
    if commit is None:
        verify = shell_command("raftune", "verify", above.parent)
        return f"Restore it, or redo its stage; {verify} lists what is damaged."
    stage = f"{int(above.name.removeprefix('round-'))}/{commit.stage.replace(' ', '-')}"
    redo = shell_command("raftune", "resume", above.parent, "--from", stage)
    return f"Restore it, or redo its stage and what follows with `{redo}`."


def _not_listed(folder: Path, name: str) -> str:
    path = folder / name
    if "/" in name and folder.name == "evaluate":
        return f"{path.parent / NAME} is missing. {fix_of(path.parent)}"
    return f"{path} was not committed: {folder / NAME} does not list it. Move it out of the folder."


def _covering(path: Path) -> tuple[Path, Manifest | None]:
    """The nearest folder above with a manifest, within the same round."""
    for folder in list(path.parents)[:_DEEPEST]:
        if ROUND.fullmatch(folder.name):
            break
        if (commit := committed(folder)) is not None:
            return folder, commit
    return path, None


@lru_cache(maxsize=20_000)
def _load(kind: type[Any], folder: Path, signature: Signature) -> Any:
    return kind.load(folder)


def _dropped(folder: Path) -> DroppedFiles | None:
    signature = _signature(folder / MARKER)
    return None if signature is None else _load(DroppedFiles, folder, signature)


def _signature(path: Path) -> Signature | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _cached_hash(path: Path) -> str:
    signature, cached = _signature(path), _hashes.get(path)
    if cached is not None and cached[0] == signature:
        return cached[1]
    sha256 = sha256_of(path)
    if signature is not None:
        _keep(path, signature, sha256)
    return sha256


def _keep(path: Path, signature: Signature, sha256: str) -> None:
    if len(_hashes) >= _MOST:
        _hashes.clear()
    _hashes[path] = signature, sha256
