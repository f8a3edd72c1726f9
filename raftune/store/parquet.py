"""Reads and writes Parquet with page checksums.

A committed file is checked against its manifest before it is opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raftune.errors import RunDamaged
from raftune.sanitize import first_line
from raftune.store.commit import DroppedFiles, FileEntry, Manifest
from raftune.store.committed import check_file
from raftune.store.files import stage_file

_WRITE = {"compression": "zstd", "write_page_checksum": True}


def write_table(
    table: pa.Table, path: Path, metadata: Mapping[str, str] | None = None, rows_per_group: int = 4096
) -> None:
    """Writes the table; equal tables and metadata give equal bytes. Groups of rows can be read one by one."""
    table = table.replace_schema_metadata(dict(sorted((metadata or {}).items())) or None)
    with path.open("wb") as file:  # a Python file, so that every event on it can be observed and tested
        pq.write_table(table, file, row_group_size=rows_per_group, **_WRITE)


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer that makes each table a row group."""
    with path.open("wb") as file, pq.ParquetWriter(file, schema, **_WRITE) as writer:
        yield writer


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The table, its page checksums verified; columns that it lacks are left out. Raises RunDamaged."""
    with _opened(path) as source:
        return source.read(columns=columns, use_threads=False)


def read_groups(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The file's row groups one after another, their page checksums verified. Raises RunDamaged."""
    with _opened(path) as source:
        for index in range(source.num_row_groups):
            yield source.read_row_group(index, columns=columns, use_threads=False)


def read_group(path: Path, index: int) -> pa.Table:
    """One row group, its page checksums verified. Raises RunDamaged."""
    with _opened(path) as source:
        return source.read_row_group(index, use_threads=False)


def read_metadata(path: Path) -> tuple[int, dict[str, str]]:
    """The number of rows and the schema's metadata. Raises RunDamaged."""
    with _opened(path) as source:
        pairs: dict[bytes, bytes] = source.schema_arrow.metadata or {}
        return source.metadata.num_rows, {k.decode(): v.decode() for k, v in pairs.items()}


def column_names(path: Path) -> list[str]:
    """The names of the file's columns. Raises RunDamaged."""
    with _opened(path) as source:
        return list(source.schema_arrow.names)


def drop_columns(folder: Path, tmp: Path, columns: Sequence[str], why: str) -> None:
    """Empties these columns of the committed tables in the folder, and lists the new files in the folder's marker.

    The manifest and the keys made from it stay as they are. First the marker lists what a file will be, then the file
    is replaced: a kill between the two leaves it as committed, and the next call continues from there.
    """
    commit, dropped = Manifest.load(folder), DroppedFiles.load(folder)
    assert commit is not None, "the stage must be committed"
    files = dict(dropped.files) if dropped is not None else {}
    for name in sorted(name for name in commit.files if name.endswith(".parquet")):
        path = folder / name
        if name in files and files[name].bytes == path.stat().st_size:
            continue
        present = [column for column in columns if column in column_names(path)]
        if not present:
            continue
        table, (_, metadata) = read_table(path), read_metadata(path)
        for column in present:
            index = table.schema.get_field_index(column)
            nulls = pa.nulls(table.num_rows, table.schema.types[index])
            table = table.set_column(index, table.schema.field(column), nulls)
        with stage_file(tmp, path) as staged:
            write_table(table, staged, metadata)
            files[name] = FileEntry.of(staged, commit.files[name].rows)
            DroppedFiles(why, tuple(columns), dict(sorted(files.items()))).save(folder, tmp)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, verifying every page that is read, on this thread alone. Raises RunDamaged that names it."""
    check_file(path)
    try:
        with path.open("rb") as file:  # buffering ahead would hand each small read to a thread and wait for it
            yield pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
    except FileNotFoundError as error:
        raise RunDamaged(
            f"{path} is missing. Restore it, or redo its stage with `raftune resume RUN --from STAGE`."
        ) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RunDamaged(
            f"{path} cannot be read: {first_line(error)}. Restore it, or redo its stage with `--from`."
        ) from error
