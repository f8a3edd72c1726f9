"""Training checkpoints with a manifest of hashes. Damaged ones are ignored."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

from raftune.store.files import sha256_of

MANIFEST = "MANIFEST.json"
# Without any one of these, transformers' Trainer resumes silently to other weights, or not at all.
STATE = frozenset({"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"})
REQUIRED = STATE | {"weights.safetensors"}


def identity(rows: Path, settings: str, seed: int) -> str:
    """Names a fit by its rows, settings and seed: checkpoints of another fit are not continued from."""
    return hashlib.sha256(f"{sha256_of(rows)}\0{settings}\0{seed}".encode()).hexdigest()


def seal(folder: Path, identity: str) -> None:
    """Writes the manifest, last and atomically: size and SHA-256 of every file, and what fit it belongs to."""
    files = {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    part = folder / f"{MANIFEST}.part"
    with part.open("w") as file:
        json.dump({"identity": identity, "files": files}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)


def verifies(folder: Path, identity: str, required: frozenset[str] = REQUIRED) -> bool:
    """True if the checkpoint is of this fit, whole, unchanged since it was sealed, and holds no code."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        whole = manifest["identity"] == identity and files.keys() >= required
        whole = whole and all(sha256_of(folder / name) == content for name, content in files.items())
        return whole and all(holds_no_code(folder / name) for name in STATE if not name.endswith(".json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def holds_no_code(path: Path) -> bool:
    """Whether a pickled file of the Trainer's is plain tensors and numbers. The tensors themselves are not read."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return False
    return True


def newest_verified(work: Path, identity: str, required: frozenset[str] = REQUIRED) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that verifies, or None; and the names of later ones that do not, which are removed."""
    rejected: list[str] = []
    for folder in sorted(work.glob("checkpoint-*"), key=_step, reverse=True):
        if verifies(folder, identity, required):
            return folder, rejected
        rejected.append(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
    return None, rejected


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
