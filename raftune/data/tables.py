"""Loads a data set as an Arrow table from a file, a `datasets` folder or the hub."""

from __future__ import annotations

import bisect
import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pyarrow.types as kinds

from raftune.data.images import content_of, is_picture, png_of
from raftune.errors import DataError
from raftune.records import JsonType, arrow_array
from raftune.sanitize import first_line

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_DELIMITERS = (",", ";", "\t", "|")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
# What Arrow raises of values that no one column can hold.
_UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, OverflowError, UnicodeEncodeError)


def read_rows(source: str, split: str = "train", field: str = "data.prompts") -> pa.Table:
    """All rows of the data set. Raises DataError that names `field`, the configuration's own name for the source.

    Columns of images hold their bytes, so that nothing depends any more on where files lay.
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


def table_from(rows: Any, field: str = "train_dataset") -> pa.Table:
    """The rows of a `datasets.Dataset`, a frame of pandas or Polars, a list of dictionaries, or an Arrow table.

    Nested values are kept as they are given. What comes in Arrow's own structs (a `datasets.Dataset` without Json
    features, Parquet) has the keys of all rows in each, None where there was none: nobody can tell those from what a
    person wrote, so rewards see them as `dataset[i]` shows them.
    """
    here = Path()
    if isinstance(rows, pa.Table):
        return with_plain_types(rows, field)
    if hasattr(rows, "with_format") and hasattr(rows, "data"):
        return with_pictures(_of_datasets(rows, field), here, field)
    if hasattr(rows, "to_dict") and hasattr(rows, "columns") and hasattr(rows, "dtypes") and hasattr(rows, "iloc"):
        return with_pictures(_of_pandas(rows, field), here, field)
    if hasattr(rows, "__arrow_c_stream__"):
        return with_pictures(with_plain_types(pa.table(rows), field), here, field)
    if isinstance(rows, Iterable):
        listed = list(rows)
        if all(isinstance(row, dict) for row in listed):
            return with_pictures(_columns_of(listed, field), here, field)
        if all(isinstance(row, str) for row in listed):
            return pa.table({"prompt": _column(listed, "prompt", field) if listed else pa.array([], pa.string())})
    raise DataError(
        f"{field} must be a datasets.Dataset, a pandas frame or a list of rows; got {type(rows).__name__}. "
        "Give a list of dictionaries with a 'prompt' key, for example."
    )


def _of_datasets(rows: Any, field: str) -> pa.Table:
    """What a `datasets.Dataset` shows: its chosen columns, and what a transform makes of them."""
    chosen = rows.format
    if chosen["type"] == "custom":  # of `with_transform`: only Python rows have passed through it
        return _columns_of([*rows], field)
    columns = None if chosen["output_all_columns"] else chosen["columns"]
    table = rows.with_format("arrow", columns=columns)[:]
    return with_plain_types(table if isinstance(table, pa.Table) else pa.Table.from_batches(table.to_batches()), field)


def _of_pandas(frame: Any, field: str) -> pa.Table:
    """The frame's columns; those of Python objects value by value, so that nested ones stay as they are."""
    columns = {}
    for name, values in frame.items():
        if values.dtype != object:
            columns[str(name)] = pa.array(values, from_pandas=True)
            continue
        cells = [None if isinstance(cell, float) and cell != cell else _of_numpy(cell) for cell in values]
        columns[str(name)] = _column([plain_cell(cell) for cell in cells], str(name), field)
    return with_plain_types(pa.table(columns), field)


def _of_numpy(cell: Any) -> Any:
    """The cell, of an array or a number of NumPy as lists and numbers of Python (as pandas reads lists of Parquet)."""
    if type(cell).__module__ == "numpy" and hasattr(cell, "tolist"):
        return _of_numpy(cell.tolist())
    if isinstance(cell, list | tuple):
        return [_of_numpy(inner) for inner in cell]
    return {name: _of_numpy(inner) for name, inner in cell.items()} if isinstance(cell, dict) else cell


def with_plain_types(table: pa.Table, field: str) -> pa.Table:
    """The table in the types that everything after it reads: JSON is ours, views are whole.

    Raises DataError for two columns of one name, and for a type that Parquet cannot hold.
    """
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise DataError(f"{field} must have each column once; there are several {twice[0]!r}. Rename them.")
    for place, column in enumerate(table.schema):
        if not _is_plain(column.type):
            table = table.set_column(place, column.name, _plain_column(table.column(place), column.name, field))
    return table


def _is_plain(kind: pa.DataType) -> bool:
    """Whether neither the type nor one within it is a view, JSON of Arrow's own, or a struct without fields."""
    if kind == JsonType():
        return True
    views = (kinds.is_string_view, kinds.is_binary_view, kinds.is_list_view, kinds.is_large_list_view)
    empty = kinds.is_struct(kind) and not kind.num_fields
    if isinstance(kind, pa.BaseExtensionType) or empty or any(is_view(kind) for is_view in views):
        return False
    if kinds.is_map(kind):
        return _is_plain(kind.key_type) and _is_plain(kind.item_type)
    return all(_is_plain(kind.field(number).type) for number in range(kind.num_fields))


def _plain_column(column: pa.ChunkedArray, name: str, field: str) -> pa.Array:
    if isinstance(column.type, pa.JsonType):
        texts = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
        return pa.ExtensionArray.from_storage(JsonType(), texts.cast(pa.string()).combine_chunks())
    cells = [_decoded(cell, column.type) for cell in column.to_pylist()]
    return _column(cells, name, field)


def _decoded(cell: Any, kind: pa.DataType) -> Any:
    """The cell, with JSON within it read."""
    if cell is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(cell)
    if isinstance(cell, list) and hasattr(kind, "value_type"):
        return [_decoded(inner, kind.value_type) for inner in cell]
    if isinstance(cell, dict) and kinds.is_struct(kind):
        return {name: _decoded(inner, kind.field(name).type) for name, inner in cell.items()}
    return cell


def with_pictures(table: pa.Table, base: Path, field: str) -> pa.Table:
    """The table, its columns of images as bytes: of `datasets`' form, or paths of files that begin in `base`.

    A column of texts is one of paths where all of them have an image's suffix and any names a file. Raises DataError
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
    """Whether every text of the column is an image's path, and any that of a file."""
    texts = column.drop_null()
    if not len(texts) or not is_picture(texts[0].as_py()):
        return False
    paths = texts.to_pylist()
    return all(map(is_picture, paths)) and any((base / Path(path).expanduser()).is_file() for path in paths)


def in_bytes(column: pa.ChunkedArray, name: str, base: Path, field: str) -> pa.Array:
    """The images' bytes. Raises DataError that names the row of a file that is not there."""
    found: list[bytes | None] = []
    for number, cell in enumerate(column.to_pylist(), 1):
        try:
            found.append(content_of(cell, base) if cell is not None and is_picture(cell) else None)
        except OSError as error:
            raise DataError(
                f"{field}: the image in row {number} of the column {name!r} cannot be read: {error.strerror}: "
                f"{error.filename}. Paths begin where the data set lies: fix or remove the row."
            ) from error
    return pa.array(found, pa.binary())


def plain_cell(value: Any) -> Any:
    """The value as Arrow takes it: of a PIL image its PNG."""
    return png_of(value) if hasattr(value, "getextrema") else value


# -- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, suffix: str, field: str) -> pa.Table:
    where = f"{field}: {path}"
    try:
        if suffix == ".parquet":
            table = pq.read_table(path, page_checksum_verification=True)
            table.validate(full=True)  # texts that are not UTF-8 would fail only where they are read
            return with_plain_types(table, where)
        if suffix in (".csv", ".tsv"):
            return _read_csv(text_of(_content(path), where), suffix, where)
        if suffix in (".json", ".jsonl", ".ndjson"):
            return _columns_of(_json_rows(text_of(_content(path), where), where), where)
    except (pa.ArrowException, ValueError, OSError, EOFError, OverflowError) as error:
        raise DataError(f"{field}: {path} cannot be read: {first_line(error)}. Fix the file.") from error
    raise DataError(
        f"{field} must end in one of {', '.join(_SUFFIXES)} (JSON may be gzipped); got {path.name!r}. Convert it."
    )


def _content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def text_of(content: bytes, where: str) -> str:
    """The text of a file: UTF-8, with or without a byte order mark, or UTF-16 with one. Raises DataError by line."""
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where} line {line} is not UTF-8 (byte {content[error.start]:#04x}). Save the file as UTF-8."
        ) from error


def _json_rows(text: str, where: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, or of one array. Raises DataError that names the line or the entry."""
    if text.lstrip()[:1] == "[":
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            listed = None  # lines that each hold an array, or a broken array: the line is named below
        if isinstance(listed, list):
            for number, row in enumerate(listed, 1):
                _check_row(row, f"{where} entry {number}")
            return listed
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            rows.append(_json_row(line, number, text, where))
    return rows


def _lines(text: str) -> Iterator[str]:
    """As text.split("\\n"), one by one."""
    at = 0
    while (end := text.find("\n", at)) >= 0:
        yield text[at:end]
        at = end + 1
    yield text[at:]


def _json_row(line: str, number: int, text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        if number == 1 and text.lstrip()[:1] in "[{" and _is_json(text):
            raise DataError(
                f"{where} must hold one JSON object a line, or an array of objects; it holds a single object over "
                'several lines. Write [{"prompt": …}, …].'
            ) from error
        raise DataError(
            f"{where} line {number} is not valid JSON: {first_line(error)}. Fix or remove the line."
        ) from error
    _check_row(row, f"{where} line {number}")
    loaded: dict[str, Any] = row
    return loaded


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_row(row: Any, place: str) -> None:
    """Raises DataError where this is no object, or holds a text that is none (half of a surrogate pair)."""
    if not isinstance(row, dict):
        raise DataError(f'{place} must be a JSON object; got {type(row).__name__}. Write {{"prompt": …}}.')
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read. Fix or remove the row.") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half of a surrogate pair, {error.object[error.start]!a}, which is no text. Fix or remove "
            "the row."
        ) from error


def _read_csv(text: str, suffix: str, where: str) -> pa.Table:
    """The columns as they are written: texts, but for those that hold nothing but numbers as Python writes them.

    So `007`, `4.50`, dates, `nan` and `true` are texts, and nothing that a file says is lost: `str` gives it back.
    """
    delimiter = "\t" if suffix == ".tsv" else delimiter_of(text)
    header = next(iter(_first_rows(text, delimiter, 1)), [])
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{where} must have each column once; there are several {twice[0]!r}. Rename them.")
    content = text.encode()
    table = pyarrow.csv.read_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 2**31 - 1)),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
    return pa.table({name: numbers_or_text(table.column(name).to_pylist()) for name in table.column_names})


def delimiter_of(text: str) -> str:
    """What separates the columns: of those that split the header, the one that splits all rows alike; else a comma."""
    widths = {}
    for delimiter in _DELIMITERS:
        first = [len(row) for row in _first_rows(text, delimiter, 20) if row]
        if first and first[0] > 1:
            widths[delimiter] = (len(set(first)) == 1, first[0])
    return max(widths, key=widths.__getitem__, default=",")


def _first_rows(text: str, delimiter: str, count: int) -> list[list[str]]:
    """The first rows, whose cells may be of any length: Python's own limit is 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return list(itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), count))
    finally:
        csv.field_size_limit(limit)


def numbers_or_text(cells: Sequence[str]) -> pa.Array:
    """The cells as numbers where all that are not empty are written as Python writes whole numbers, or others."""
    filled = [cell for cell in cells if cell]
    if not filled:
        return pa.nulls(len(cells))
    if all(map(_INTEGER.fullmatch, filled)):
        return pa.array([int(cell) if cell else None for cell in cells], pa.int64())
    if all(map(_is_decimal, filled)):
        return pa.array([float(cell) if cell else None for cell in cells], pa.float64())
    return pa.array(cells, pa.string())


def _is_decimal(cell: str) -> bool:
    try:
        return cell not in ("nan", "inf", "-inf") and repr(float(cell)) == cell
    except ValueError:
        return False


# -- columns ---------------------------------------------------------------------------------------------------------


def _columns_of(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    """The columns of every name that any row has. Raises DataError that names a row unlike those before it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({str(name): _column([plain_cell(row.get(name)) for row in rows], name, where) for name in names})


def _column(cells: Sequence[Any], name: str, where: str) -> pa.Array:
    if all(cell is None or (isinstance(cell, dict) and cell.keys() == {"bytes", "path"}) for cell in cells):
        return pa.array(cells)  # images, as `datasets` has them
    try:
        return arrow_array(cells)
    except _UNFIT as error:
        row = bisect.bisect_left(range(len(cells) + 1), True, key=lambda count: not _fit(cells[:count]))
        cell = cells[row - 1]
        if isinstance(error, UnicodeEncodeError):
            raise DataError(
                f"{where}: row {row} of the column {name!r} holds half of a surrogate pair, which is no text: "
                f"{cell!a:.60}. Fix or remove the row."
            ) from error
        if not _fit([cell]):
            raise DataError(
                f"{where}: the column {name!r} must hold texts, numbers, or lists and dictionaries of them; row {row} "
                f"holds {cell!r:.60}, a {type(cell).__name__}. Fix the row."
            ) from error
        raise DataError(
            f"{where}: the column {name!r} must hold values of one kind; row {row} holds {cell!r:.60}, "
            "unlike those before it. Fix the row."
        ) from error


def _fit(cells: Sequence[Any]) -> bool:
    """Whether one column can hold these cells."""
    try:
        arrow_array(cells)
    except _UNFIT:
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
    return with_pictures(table_from(_split_of(loaded, split, field), field), path, field)


def _read_hub(source: str, split: str, field: str) -> pa.Table:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise DataError(
            f"{field} must name a file or a data set on the hub; {source!r} is no file here, and the hub said: "
            f"{first_line(error)}. Check the name, the split ({split!r}) and the network."
        ) from error
    return table_from(loaded, field)


def _split_of(loaded: Any, split: str, field: str) -> Any:
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise DataError(f"{field}: there is no split {split!r}; there are {', '.join(loaded)}. Set the split.")
    return loaded[split]
