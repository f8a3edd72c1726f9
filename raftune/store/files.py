"""Writes files and folders atomically.

Every write: a unique name under `tmp/`, fsync, rename into place, fsync of the directory; those of a stage together,
before its manifest. A killed process leaves at most files under `tmp/`, which the next holder of the run's lock
removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raftune.errors import RaftuneError, StoreError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than files may be here (`ulimit -f`)",
}
_DENIED = "permission is denied. Choose an output_dir that you may write"
_FORBIDDEN = {
    errno.EROFS: "the file system is read-only. Choose another output_dir",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
}
# In errors that are no OSError: safetensors gives the number of the system's error, torch only words.
_NUMBERED = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_TORN = ("PytorchStreamWriter failed writing", "file write failed", "unexpected pos")
_UMASK = os.umask(0)
os.umask(_UMASK)
_MODE = 0o666 & ~_UMASK


@contextlib.contextmanager
def explaining(*paths: Path) -> Iterator[None]:
    """Turns the operating system's refusal to write at one of these places into a StoreError that names the fix.

    A full disk is reported wherever it occurs, also where torch or safetensors raise an error of their own.
    """
    try:
        yield
    except RaftuneError:
        raise
    except Exception as error:
        refusal = _refusal_to_write(error)
        if refusal is None:
            raise
        name, code = str(refusal.filename or paths[0]), refusal.errno or 0
        if code in _FULL:
            fix = "Free some space and run the same command again: what is committed is intact"
            raise StoreError(f"cannot write {name}: {_FULL[code]}. {fix}.") from error
        if code in _FORBIDDEN and any(name.startswith(str(path)) for path in paths):
            raise StoreError(f"cannot write {name}: {_FORBIDDEN[code]}.") from error
        raise


def _refusal_to_write(error: BaseException) -> OSError | None:
    """The system's error behind this one: itself, one that it came from, or one that its text names."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        text = str(link)
        if match := _NUMBERED.search(text):
            return OSError(int(match[1] or match[2]), text)
        if any(words in text for words in _TORN):
            return OSError(errno.ENOSPC, text)
        link = link.__cause__ or link.__context__
    return None


def sync(*paths: Path) -> None:
    """Makes the contents of files and the entries of folders durable, several in parallel."""
    if len(paths) == 1:
        _sync(paths[0])
        return
    with ThreadPoolExecutor(min(8, len(paths) - 1)) as pool:
        others = pool.map(_sync, paths[1:])
        _sync(paths[0])
        list(others)


def _sync(path: Path) -> None:
    folder = path.is_dir()
    if folder and os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(staged: Path, final: Path) -> None:
    """Moves a finished file from `tmp/` to its final path, replacing any file there."""
    if not final.parent.is_dir():
        ensure_folder(final.parent.parent)
        final.parent.mkdir(exist_ok=True)
    set_usual_mode(staged)
    staged.replace(final)


def set_usual_mode(*paths: Path) -> None:
    """Gives files, and all those in folders, the mode of any new file: some writers make theirs 0600."""
    if os.name == "nt":
        return
    for path in paths:
        for file in [path] if path.is_file() else path.rglob("*"):
            if not file.is_symlink() and file.is_file() and file.stat().st_mode & 0o666 != _MODE:
                file.chmod(_MODE)


def publish(staged: Path, final: Path) -> None:
    """Moves a finished file to its final path, durably."""
    with explaining(staged, final):
        sync(staged)
        move(staged, final)
        sync(final.parent)


def publish_unsealed(staged: Path, final: Path) -> None:
    """Moves a finished file to its final path, its content durable; its name becomes durable with its manifest."""
    with explaining(staged, final):
        sync(staged)
        move(staged, final)


def publish_folder(staged: Path, final: Path) -> None:
    """Moves every finished file below `staged` to its place below `final`, as `publish_unsealed` does."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with explaining(staged, final):
        if files:
            sync(*files)
        for path in files:
            move(path, final / path.relative_to(staged))


def publish_directory(staged: Path, final: Path) -> None:
    """Gives a finished directory its final name in one rename, its content durable before."""
    with explaining(staged, final):
        set_usual_mode(staged)
        sync(*sorted(path for path in staged.rglob("*") if path.is_file()), staged)
        staged.rename(final)
        sync(final.parent)


def publish_seal(staged: Path, final: Path, listed: Iterable[str]) -> None:
    """Publishes a manifest after making the names of the files that it lists durable."""
    folders = {final.parent, *((final.parent / name).parent for name in listed)}
    with explaining(staged, final):
        sync(staged, *sorted(folders))
        move(staged, final)
        sync(final.parent, final.parent.parent)


def ensure_folder(folder: Path) -> None:
    """Makes the folder and those above it where they are missing, durably."""
    if not folder.is_dir():
        ensure_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextlib.contextmanager
def stage_file(tmp: Path, final: Path, publish: Callable[[Path, Path], None] = publish) -> Iterator[Path]:
    """Yields a unique path under `tmp`; the file written there is published at `final` if the block succeeds."""
    staged = unique(tmp, final.suffix)
    try:
        with explaining(tmp, final):
            yield staged
        publish(staged, final)
    finally:
        if staged.exists():  # the block failed
            staged.unlink()


def unique(tmp: Path, suffix: str = "") -> Path:
    """A new path under `tmp`."""
    with explaining(tmp):
        ensure_folder(tmp)
    return tmp / f"{uuid.uuid4().hex}{suffix}"


def write_json(tmp: Path, final: Path, value: Any) -> None:
    """Publishes the value as JSON: sorted keys, two spaces, so that equal values give equal bytes."""
    with stage_file(tmp, final) as staged:
        staged.write_bytes(json_bytes(value))


def dump_json(path: Path, value: Any, *, sort_keys: bool = True, allow_nan: bool = True) -> None:
    """Writes a file of an unfinished folder as indented ASCII JSON and a line break."""
    path.write_bytes(json_bytes(value, sort_keys=sort_keys, allow_nan=allow_nan, ensure_ascii=True))


def json_bytes(value: Any, *, sort_keys: bool = True, allow_nan: bool = False, ensure_ascii: bool = False) -> bytes:
    """The value as indented JSON and a line break, UTF-8."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=allow_nan, ensure_ascii=ensure_ascii)
    return f"{text}\n".encode()


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_hex(parts: Iterable[str | bytes | memoryview]) -> str:
    """The hexadecimal SHA-256 over parts that follow one another, text as UTF-8."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part)
    return total.hexdigest()


def fingerprint_of(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over the sorted names, sizes and contents of those of the folder's paths that are files, not hidden."""
    files = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    return sha256_hex(
        f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0{sha256_of(path)}\n" for path in files
    )


def discard(path: Path, tmp: Path) -> None:
    """Deletes a file or folder after one rename, so that no half of it is ever seen at its old place."""
    if not path.exists():
        return
    aside = unique(tmp)
    with explaining(path):
        path.replace(aside)
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
