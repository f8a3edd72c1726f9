"""Reads committed files after checking them against their manifest.

A file is hashed once in a process, and again when its size, time or inode has changed. Files that the process committed
itself count as checked. Files that no manifest lists are not checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from raftune.errors import RunDamaged
from raftune.sanitize import shell_command
from raftune.store import commit as commits
from raftune.store.commit import MARKER, DroppedFiles, FileEntry, Manifest, has_changed, surplus, with_hash
from raftune.store.files import json_bytes, sha256_of

_ROUND = re.compile(r"round-(\d{4,})$")
MANIFEST = "raftune_files.json"
# The list itself, what people edit, and what is deleted before a model is given away.
UNLISTED = (MANIFEST, "README.md", "parity.json")
_DEEPEST = 4  # folders between a committed file and its manifest: those of a pipeline's parts
_MOST = 200_000  # files remembered
_SMALL = 50_000_000  # bytes: below, threads cost more than they save
T = TypeVar("T")
Signature = tuple[int, int, int]

_hashes: dict[Path, tuple[Signature, str]] = {}
_commits: dict[Path, tuple[Signature, Manifest | None]] = {}
_markers: dict[Path, tuple[Signature, DroppedFiles | None]] = {}


def check_file(path: Path) -> Path:
    """The path, after its content was compared with its manifest. Raises RunDamaged that names file and fix."""
    folder, commit = _covering(path)
    if folder is None or commit is None:
        return path
    name = path.relative_to(folder).as_posix()
    if name not in commit.files:
        raise RunDamaged(_not_listed(path, folder, name))
    if fault := _fault(path, commit.files[name], _dropped(folder), name):
        raise RunDamaged(f"{fault}. {fix_of(folder, commit)}")
    return path


def check_folder(folder: Path) -> Path:
    """The folder, after all that its manifest lists was compared, and nothing else lies in it. Raises RunDamaged.

    What was let go on purpose is not missed. A model folder in other hands has a manifest instead, which what was
    added to the folder since does not concern. Without either there is nothing to compare.
    """
    commit, dropped = committed(folder), _dropped(folder)
    if commit is None:
        check_manifest(folder)
        return folder
    if strangers := surplus(folder, commit):
        raise RunDamaged(_not_listed(folder / strangers[0], folder, strangers[0]))
    gone = dropped is not None and not dropped.columns
    names = [name for name in commit.files if not gone or (folder / name).is_file()]

    def fault_of(name: str) -> str:
        return _fault(folder / name, commit.files[name], dropped, name)

    if sum(commit.files[name].bytes for name in names) < _SMALL:
        faults = list(map(fault_of, names))
    else:
        with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter to others
            faults = list(pool.map(fault_of, names))
    if fault := next(filter(None, faults), None):
        raise RunDamaged(f"{fault}. {fix_of(folder, commit)}")
    return folder


def signatures(folder: Path) -> dict[str, Signature]:
    """Size, time and inode of every file below a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = ((path.relative_to(folder).as_posix(), _signature(path)) for path in paths)
    return {name: signature for name, signature in found if signature is not None}


def write_manifest(folder: Path, before: Mapping[str, Signature] | None = None) -> None:
    """Lists a finished model folder's files with their hashes, for those who load it later: see `check_folder`.

    Files that are as they were `before` are somebody else's.
    """
    now, before = signatures(folder), before or {}
    names = [name for name in now if now[name] != before.get(name) and name not in UNLISTED]
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}
    content = {"files": {name: entry for name, entry in files.items() if not name.startswith(".")}}
    (folder / MANIFEST).write_bytes(json_bytes(with_hash(content)))


def check_manifest(folder: Path) -> None:
    """Raises RunDamaged for the first file that is not as the folder's manifest says, if it has one."""
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
        if fault := _fault(folder / name, entry, None, name):
            raise RunDamaged(f"{fault.replace('committed', 'written')}. {fix}")


def read_json(path: Path) -> Any:
    """What a JSON file holds, checked. Raises RunDamaged, also where it is missing."""
    try:
        return json.loads(check_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunDamaged(f"{path} is missing. {fix_of(path.parent, None)}") from error
    except ValueError as error:
        raise RunDamaged(f"{path} is not valid JSON. {fix_of(path.parent, None)}") from error


def committed(folder: Path) -> Manifest | None:
    """The folder's manifest, None without one; read anew only where it has changed. Raises RunDamaged, RunTooNew."""
    return _cached(_commits, folder, commits.NAME, Manifest.load)


def is_listed(path: Path) -> bool:
    """Whether a manifest says that there is this file."""
    folder, commit = _covering(path)
    return folder is not None and commit is not None and path.relative_to(folder).as_posix() in commit.files


def remember(folder: Path, files: Iterable[tuple[str, FileEntry]]) -> None:
    """Takes files for checked that this process hashed as it wrote them."""
    for name, entry in files:
        if (signature := _signature(folder / name)) is not None:
            _keep(folder / name, signature, entry.sha256)


def fix_of(folder: Path, commit: Manifest | None) -> str:
    """What mends a committed folder."""
    round_folder = next((parent for parent in folder.parents if _ROUND.match(parent.name)), None)
    if round_folder is None:
        return "Restore it, or write the folder anew."
    root, number = round_folder.parent, int(round_folder.name.removeprefix("round-"))
    if commit is None:
        return f"Restore it, or redo its stage; {shell_command('raftune', 'verify', root)} lists what is damaged."
    place = f"{number}/{commit.stage.replace(' ', '-')}"
    redo = shell_command("raftune", "resume", root, "--from", place)
    return f"Restore it, or redo its stage and what follows with `{redo}`."


def _fault(path: Path, entry: FileEntry, dropped: DroppedFiles | None, name: str) -> str:
    """What differs between the file and its entry; empty where nothing does."""
    known = [entry, *([dropped.files[name]] if dropped is not None and name in dropped.files else [])]
    signature = _signature(path)
    if signature is None:
        return f"{path} is missing"
    if signature[0] not in [one.bytes for one in known]:
        return f"{path} has {signature[0]} bytes; {known[-1].bytes} were committed"
    if _hash(path, signature) not in [one.sha256 for one in known]:
        return f"{path} has changed since it was committed (its SHA-256 differs)"
    return ""


def _not_listed(path: Path, folder: Path, name: str) -> str:
    if "/" in name and folder.name == "evaluate":
        return f"{path.parent / commits.NAME} is missing. {fix_of(path.parent, None)}"
    return f"{path} was not committed: {folder / commits.NAME} does not list it. Move it out of the folder."


def _covering(path: Path) -> tuple[Path | None, Manifest | None]:
    """The nearest folder above with a manifest, within the same round."""
    for folder in list(path.parents)[:_DEEPEST]:
        if _ROUND.match(folder.name):
            break
        if (commit := committed(folder)) is not None:
            return folder, commit
    return None, None


def _dropped(folder: Path) -> DroppedFiles | None:
    return _cached(_markers, folder, MARKER, DroppedFiles.load)


def _cached(known: dict[Path, tuple[Signature, T]], folder: Path, name: str, load: Callable[[Path], T]) -> T | None:
    """What a file of the store in this folder says, read anew where it has changed; None without it."""
    signature = _signature(folder / name)
    if signature is None:
        return None
    if folder not in known or known[folder][0] != signature:
        if len(known) >= _MOST // 20:
            known.clear()
        known[folder] = signature, load(folder)
    return known[folder][1]


def _signature(path: Path) -> Signature | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _hash(path: Path, signature: Signature) -> str:
    known = _hashes.get(path)
    if known is None or known[0] != signature:
        _keep(path, signature, sha256_of(path))
    return _hashes[path][1]


def _keep(path: Path, signature: Signature, sha256: str) -> None:
    if len(_hashes) >= _MOST:
        _hashes.clear()
    _hashes[path] = signature, sha256
