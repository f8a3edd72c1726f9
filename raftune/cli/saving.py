"""Pictures of samples as files that anybody can look at, with an index that `datasets` reads as an image folder."""

from __future__ import annotations

import json as js
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raftune.errors import ConfigError
from raftune.ledger import Sample
from raftune.pictures import file_name
from raftune.store.files import explaining

INDEX = "metadata.jsonl"
TOLD = ("sample_id", "prompt_id", "k", "source", "score", "held_out", "weight", "reason")


def check_folder(folder: Path) -> None:
    """Raises ConfigError unless pictures can be written there without touching what somebody else wrote."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--save must be a new or an empty folder; {folder} is not. Choose another.")


def save_pictures(samples: Iterable[Sample], folder: Path, round_: int) -> int:
    """Writes each picture once, named by its content, and metadata.jsonl with a line a sample; returns their number.

    No text of a prompt is part of a path. Raises ConfigError where no sample holds a picture.
    """
    shown = [sample for sample in samples if isinstance(sample["completion"], bytes)]
    if not shown:
        raise ConfigError("--save writes pictures, and these samples hold none. Leave it out.")
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for sample in shown:
            (folder / file_name(sample["completion"])).write_bytes(sample["completion"])
        lines = [js.dumps(described(sample, round_), ensure_ascii=False) for sample in shown]
        (folder / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(shown)


def described(sample: Sample, round_: int) -> dict[str, Any]:
    """The picture's line in the index: what was asked, and what came of it."""
    known = {name: sample[name] for name in TOLD if name in sample}
    rewards = {name: value for name, value in sample.items() if name.startswith("rewards/")}
    return {
        "file_name": file_name(sample["completion"]),
        "prompt": sample["prompt"],
        "round": round_,
        **known,
        **rewards,
    }
