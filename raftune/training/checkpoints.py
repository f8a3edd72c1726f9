"""Training checkpoints with a manifest of hashes. Damaged ones are ignored."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from raftune.store import interruption
from raftune.store.files import sha256_hex, sha256_of
from raftune.store.partial import SavePace

MANIFEST = "MANIFEST.json"
# Without any one of these, transformers' Trainer resumes silently to other weights, or not at all.
STATE = frozenset({"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"})
REQUIRED = STATE | {"weights.safetensors"}


def required_files(processes: int, sharded: bool) -> frozenset[str]:
    """The files of a checkpoint by so many processes: of each its random states, and its shards where it holds some."""
    if processes == 1:
        return REQUIRED
    ranks = range(processes)
    once = REQUIRED - {"rng_state.pth"} - ({"optimizer.pt", "weights.safetensors"} if sharded else set())
    shards = {name for rank in ranks for name in (f"weights-{rank}.safetensors", f"optimizer-{rank}.pt")}
    return once | {f"rng_state_{rank}.pth" for rank in ranks} | (shards if sharded else frozenset())


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Takes and seals a checkpoint about once a minute, and where a stop was requested; none after the last step, as
    the model itself is saved then. When it was taken leaves no trace in the result."""

    def __init__(self, identity: str, nbytes: int) -> None:
        """`nbytes`: about how much a checkpoint writes."""
        self.identity, self.nbytes, self.pace = identity, nbytes, SavePace()
        self.started, self.stop = 0.0, False

    def promise(self) -> str:
        """What a stop after the current step keeps, in words."""
        return self.pace.promise(lambda: self.nbytes)

    def wishes(self) -> tuple[bool, bool]:
        """Whether a checkpoint is due, and whether a stop was requested."""
        stop = interruption.asked()  # first: a request that comes in between is met after the next step
        return self.pace.due(lambda: self.nbytes), stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_step(state, control, *self.wishes())

    def end_step(self, state: Any, control: Any, save: bool, stop: bool) -> None:
        """Saves if `save`, then stops if `stop`; after the last step neither."""
        self.stop = stop and state.global_step < state.max_steps
        if state.global_step >= state.max_steps:
            control.should_save = False
            return
        control.should_save |= save
        self.started = time.monotonic()
        if self.stop and not control.should_save:
            interruption.raise_if_asked()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.pace.took(time.monotonic() - self.started, self.nbytes)
        if self.stop:
            interruption.raise_if_asked()

    def seal(self, folder: Path) -> None:
        seal(folder, self.identity)


def identity(rows: Path, settings: str, seed: int) -> str:
    """Names a fit by its rows, settings and seed: checkpoints of another fit are ignored."""
    return sha256_hex([f"{sha256_of(rows)}\0{settings}\0{seed}"])


def seal(folder: Path, identity: str) -> None:
    """Writes the manifest, last and atomically: the identity, and the SHA-256 of every file."""
    files = {p.name: sha256_of(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST}
    part = folder / f"{MANIFEST}.part"
    with part.open("w") as file:
        json.dump({"identity": identity, "files": files}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / MANIFEST)


def verifies(folder: Path, identity: str, required: frozenset[str] = REQUIRED) -> bool:
    """True if the checkpoint is of this fit, complete, unchanged since it was sealed, and holds no code."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        intact = manifest["identity"] == identity and files.keys() >= required
        intact = intact and all(sha256_of(folder / name) == content for name, content in files.items())
        return intact and all(holds_no_code(folder / name) for name in files if name.endswith((".pt", ".pth")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def of_other_processes(work: Path, identity: str) -> list[str]:
    """The checkpoints of this fit by other processes: more, fewer, or ones that shared the model in another way."""
    names = []
    for path in sorted(work.glob(f"checkpoint-*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_text())["identity"]
            if found != identity and found.partition("/")[0] == identity.partition("/")[0]:
                names.append(path.parent.name)
    return names


def holds_no_code(path: Path) -> bool:
    """Whether a pickled file of the Trainer's is plain tensors and numbers. The tensors themselves are not read."""
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return False
    return True


def newest_verified(work: Path, identity: str, required: frozenset[str] = REQUIRED) -> tuple[Path | None, list[str]]:
    """The latest checkpoint that verifies, or None; and the names of later ones that do not, which are removed."""

    def step(folder: Path) -> int:
        number = folder.name.rpartition("-")[2]
        return int(number) if number.isdigit() else -1

    rejected: list[str] = []
    for folder in sorted(work.glob("checkpoint-*"), key=step, reverse=True):
        if verifies(folder, identity, required):
            return folder, rejected
        rejected.append(folder.name)
        shutil.rmtree(folder, ignore_errors=True)
    return None, rejected
