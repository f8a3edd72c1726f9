"""Checkpoints inside a fit: sealed by a manifest of hashes, and believed only if every byte is as it was sealed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "MANIFEST.json"
# Without any one of these, transformers' Trainer resumes silently to other weights, or not at all.
REQUIRED = frozenset({"weights.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"})


def identity(rows: Path, settings: str, seed: int) -> str:
    """Names a fit by its rows, settings and seed: checkpoints of another fit are not continued from."""
    return hashlib.sha256(f"{_hash(rows)}\0{settings}\0{seed}".encode()).hexdigest()


def seal(folder: Path, identity: str) -> None:
    """Writes the manifest, last and atomically: size and SHA-256 of every file, and what fit it belongs to."""
    files = {p.name: _hash(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    part = folder / f"{MANIFEST}.part"
    with part.open("w") as file:
        json.dump({"identity": identity, "files": files}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)


def verifies(folder: Path, identity: str) -> bool:
    """True if the checkpoint is of this fit, whole, and unchanged since it was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        whole = manifest["identity"] == identity and files.keys() >= REQUIRED
        return whole and all(_hash(folder / name) == content for name, content in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def newest_verified(work: Path, identity: str) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that verifies, or None; and the names of later ones that do not, which are removed."""
    rejected: list[str] = []
    for folder in sorted(work.glob("checkpoint-*"), key=_step, reverse=True):
        if verifies(folder, identity):
            return folder, rejected
        rejected.append(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
    return None, rejected


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
