"""Path names of stage inputs and chunk files."""

from __future__ import annotations

from pathlib import Path

from raftune.errors import RunDamaged
from raftune.store.commit import NAME
from raftune.store.committed import committed, fix_of


def source_of(read: str, round_: int) -> tuple[int, str]:
    """The round and folder of a stage input: "generate" of this round, "model@-1" of the last, "data@0" of round 0."""
    name, _, when = read.partition("@")
    if not when:
        return round_, name
    return (round_ + int(when) if when.startswith("-") else int(when)), name


def chunk_file(index: int) -> str:
    return f"chunk-{index:05d}.parquet"


def batch_file(index: int) -> str:
    """The file that records the smaller batch size after running out of memory."""
    return f"chunk-{index:05d}.batch.json"


def chunk_numbers(*folders: Path) -> list[int]:
    """The chunks that every one of these committed folders holds, ascending. Raises RunDamaged without a manifest."""
    held = []
    for folder in folders:
        if not folder.is_dir():
            return []
        if (commit := committed(folder)) is None:
            raise RunDamaged(f"{folder / NAME} is missing. {fix_of(folder)}")
        tables = (name for name in commit.files if name.endswith(".parquet"))
        held.append({int(name.removeprefix("chunk-").removesuffix(".parquet")) for name in tables})
    return sorted(set.intersection(*held))
