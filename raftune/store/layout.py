"""Path names of stage inputs and chunk files."""

from __future__ import annotations

from pathlib import Path

from raftune.errors import RunDamaged
from raftune.store.commit import NAME
from raftune.store.committed import committed, fix_of


def source_of(read: str, round_: int) -> tuple[int, str]:
    """The round and the folder that a read names: "generate" is of this round, "model@-1" of the last, "data@0" round
    0.
    """
    name, _, when = read.partition("@")
    if not when:
        return round_, name
    return (round_ + int(when) if when.startswith("-") else int(when)), name


def chunk_file(index: int) -> str:
    return f"chunk-{index:05d}.parquet"


def batch_file(index: int) -> str:
    """Where a batch size stands on record that an out-of-memory made smaller."""
    return f"chunk-{index:05d}.batch.json"


def chunk_numbers(*folders: Path) -> list[int]:
    """The chunks that every one of these committed folders holds, ascending: without those that were set aside.

    Raises RunDamaged where a folder's manifest is gone.
    """
    held = []
    for folder in folders:
        if not folder.is_dir():
            return []
        if (commit := committed(folder)) is None:
            raise RunDamaged(f"{folder / NAME} is missing. {fix_of(folder, None)}")
        held.append(
            {
                int(name.removeprefix("chunk-").removesuffix(".parquet"))
                for name in commit.files
                if name.endswith(".parquet")
            }
        )
    return sorted(set.intersection(*held))
