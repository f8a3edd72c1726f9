"""Removes parts of a committed stage deliberately, and records it beside the manifest.

The manifest stays as it is, and so do the keys made from it. The marker lists removed files, or the sizes and hashes of
files without their removed columns, so damage is still found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from raftune.store.commit import MARKER, DroppedFiles, FileEntry, Manifest
from raftune.store.files import stage_file
from raftune.store.parquet import column_names, read_metadata, read_table, write_table

__all__ = ["MARKER", "DroppedFiles", "drop_columns"]


def drop_columns(folder: Path, tmp: Path, columns: Sequence[str], why: str) -> None:
    """Empties these columns of the committed tables in the folder; files without any of them stay as they are.

    File by file: first the marker says what the file will be, then it is replaced. A kill between the two leaves the
    file as it was committed, and the next call goes on from there.
    """
    commit, known = Manifest.load(folder), DroppedFiles.load(folder)
    assert commit is not None, "only what is committed is let go"
    files = dict(known.files) if known is not None else {}
    for name in sorted(name for name in commit.files if name.endswith(".parquet")):
        path = folder / name
        if name in files and files[name].bytes == path.stat().st_size:
            continue
        present = [column for column in columns if column in column_names(path)]
        if not present:
            continue
        with stage_file(tmp, path) as staged:
            write_without(path, staged, present)
            files[name] = FileEntry(**asdict(FileEntry.of(staged)) | {"rows": commit.files[name].rows})
            DroppedFiles(why, tuple(columns), dict(sorted(files.items()))).save(folder, tmp)


def write_without(path: Path, out: Path, columns: Sequence[str]) -> None:
    """The table with nothing in these columns, every other value and the metadata as they were."""
    table, (_, metadata) = read_table(path), read_metadata(path)
    for name in columns:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.nulls(table.num_rows, table.schema.types[place]))
    write_table(table, out, metadata)
