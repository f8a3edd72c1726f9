"""Data sets become one Arrow table, whatever they lie in: a file, a `datasets` folder, or a name on the hub."""

from __future__ import annotations

import bisect
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pyarrow.types as kinds

from raftune.errors import DataError
from raftune.pictures import content_of, is_picture, png_of
from raftune.plain import first_line

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".parquet")


def read_rows(source: str, split: str = "train", field: str = "data.prompts") -> pa.Table:
    """All rows of the data set. Raises DataError that names `field`, the configuration's own name for the source.

    Columns of pictures hold their bytes, so that nothing depends any more on where files lay.
    """
    path = Path(source).expanduser()
    suffix = Path(source.removesuffix(".gz")).suffix
    if path.is_file():
        return with_pictures(_read_file(path, suffix, field), path.parent, field)
    if path.is_dir():
        return _read_folder(path, split, field)
    if suffix in _SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(
            f"{field} must name a file that exists; got {source!r}. Check the path, which starts from here."
        )
    return _read_hub(source, split, field)


def table_from(rows: Any) -> pa.Table:
    """The rows of a `datasets.Dataset`, a pandas frame, a list of dictionaries, or an Arrow table."""
    here, field = Path(), "train_dataset"
    if isinstance(rows, pa.Table):
        return rows
    if hasattr(rows, "to_arrow") or (hasattr(rows, "with_format") and hasattr(rows, "data")):
        return with_pictures(_plain(rows.with_format("arrow")[:]), here, field)
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        return with_pictures(pa.Table.from_pandas(rows, preserve_index=False), here, field)
    if isinstance(rows, Iterable):
        listed = list(rows)
        if all(isinstance(row, dict) for row in listed):
            return with_pictures(_columns_of(listed, field), here, field)
        if all(isinstance(row, str) for row in listed):
            return pa.table({"prompt": pa.array(listed, pa.string())})
    raise DataError(
        f"train_dataset must be a datasets.Dataset, a pandas frame or a list of rows; got {type(rows).__name__}. "
        "Give a list of dictionaries with a 'prompt' key, for example."
    )


def with_pictures(table: pa.Table, base: Path, field: str) -> pa.Table:
    """The table, its columns of pictures as bytes: of `datasets`' form, or paths of files that begin in `base`.

    A column of texts is one of paths where all of them have a picture's suffix and any names a file. Raises DataError
    for one that does not.
    """
    for place, name in enumerate(table.column_names):
        column, kind = table.column(name), table.column(name).type
        texts = kinds.is_string(kind) or kinds.is_large_string(kind)
        of_datasets = kinds.is_struct(kind) and {one.name for one in kind} == {"bytes", "path"}
        if of_datasets or (texts and names_pictures(column, base)):
            table = table.set_column(place, name, in_bytes(column, name, base, field))
    return table


def names_pictures(column: pa.ChunkedArray, base: Path) -> bool:
    """Whether every text of the column is a picture's path, and any that of a file."""
    texts = column.drop_null()
    if not len(texts) or not is_picture(texts[0].as_py()):
        return False
    paths = texts.to_pylist()
    return all(map(is_picture, paths)) and any((base / Path(path).expanduser()).is_file() for path in paths)


def in_bytes(column: pa.ChunkedArray, name: str, base: Path, field: str) -> pa.Array:
    """The pictures' bytes. Raises DataError that names the row of a file that is not there."""
    found: list[bytes | None] = []
    for number, cell in enumerate(column.to_pylist(), 1):
        try:
            found.append(content_of(cell, base) if cell is not None and is_picture(cell) else None)
        except OSError as error:
            raise DataError(
                f"{field}: the picture in row {number} of the column {name!r} cannot be read: {error.strerror}: "
                f"{error.filename}. Paths begin where the data set lies: mend or remove the row."
            ) from error
    return pa.array(found, pa.binary())


def plain_cell(value: Any) -> Any:
    """The value as Arrow takes it: of a PIL picture its PNG."""
    return png_of(value) if hasattr(value, "getextrema") else value


def _plain(table: Any) -> pa.Table:
    return table if isinstance(table, pa.Table) else pa.Table.from_batches(table.to_batches())


def _read_file(path: Path, suffix: str, field: str) -> pa.Table:
    try:
        if suffix == ".parquet":
            return pq.read_table(path, page_checksum_verification=True)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if suffix == ".csv":
            return pyarrow.csv.read_csv(
                io.BytesIO(content), parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
            )
        if suffix == ".json" and content.lstrip()[:1] == b"[":
            return pa.Table.from_pylist(json.loads(content))
        if suffix in (".json", ".jsonl", ".ndjson"):
            return _read_json_lines(content, path, field)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError, OSError, OverflowError) as error:
        raise DataError(f"{field}: {path} cannot be read: {first_line(error)}. Mend the file.") from error
    raise DataError(
        f"{field} must end in one of {', '.join(_SUFFIXES)} (JSON may be gzipped); got {path.name!r}. Convert it."
    )


def _read_json_lines(content: bytes, path: Path, field: str) -> pa.Table:
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{field}: {path} line {number} is not valid JSON: {first_line(error)}. Mend or remove the line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f'{field}: {path} line {number} must be a JSON object; got {type(row).__name__}. Write {{"prompt": …}}.'
            )
        rows.append(row)
    return _columns_of(rows, f"{field}: {path}")


def _columns_of(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    """The columns of every name that any row has. Raises DataError that names a row unlike those before it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([plain_cell(row.get(name)) for row in rows], name, where) for name in names})


def _column(cells: Sequence[Any], name: str, where: str) -> pa.Array:
    try:
        return pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        row = bisect.bisect_left(range(len(cells) + 1), True, key=lambda count: not _fit(cells[:count]))
        raise DataError(
            f"{where}: the column {name!r} must hold values of one kind; row {row} holds {cells[row - 1]!r:.60}, "
            "unlike those before it. Mend the row."
        ) from error


def _fit(cells: Sequence[Any]) -> bool:
    """Whether one column can hold these cells."""
    try:
        pa.array(cells)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    return True


def _read_folder(path: Path, split: str, field: str) -> pa.Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{field}: {path} is not a folder that `datasets` saved: {first_line(error)}. Name a file in it."
        ) from error
    return with_pictures(table_from(_split_of(loaded, split, field)), path, field)


def _read_hub(source: str, split: str, field: str) -> pa.Table:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise DataError(
            f"{field} must name a file or a data set on the hub; {source!r} is no file here, and the hub said: "
            f"{first_line(error)}. Check the name, the split ({split!r}) and the network."
        ) from error
    return table_from(loaded)


def _split_of(loaded: Any, split: str, field: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"{field}: there is no split {split!r}; there are {', '.join(loaded)}. Set the split.")
    return loaded[split]
