"""How stages name what they read, and units their files."""

from __future__ import annotations

from pathlib import Path


def source_of(read: str, round_: int) -> tuple[int, str]:
    """The round and the folder that a read names: "draw" of this round, "model@-1" of the last, "data@0" of the start."""
    name, _, when = read.partition("@")
    if not when:
        return round_, name
    return (round_ + int(when) if when.startswith("-") else int(when)), name


def unit_file(index: int) -> str:
    return f"unit-{index:05d}.parquet"


def batch_file(index: int) -> str:
    """Where a batch size stands on record that an out-of-memory made smaller."""
    return f"unit-{index:05d}.batch.json"


def unit_numbers(folder: Path) -> list[int]:
    """The units that a committed folder holds, ascending: without those that were quarantined."""
    return sorted(int(path.stem.removeprefix("unit-")) for path in folder.glob("unit-*.parquet"))
