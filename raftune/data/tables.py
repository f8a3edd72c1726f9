"""Loads a data set as an Arrow table from a file, a `datasets` folder or the hub."""

from __future__ import annotations

import bisect
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pyarrow.types as kinds

from raftune.data.images import content_of, is_picture, png_of
from raftune.data.rows import SkippedRow, SkipReason
from raftune.errors import DataError
from raftune.records import JsonType, Row, arrow_array, without_none
from raftune.sanitize import first_line

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXTS = ("completion", "response", "answer", "chosen", "rejected")  # columns whose numbers in a CSV file stay texts
BATCH = 1024  # rows of an Arrow table that are Python objects at the same time
_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
# What Arrow raises of values that no one column can hold.
_INCOMPATIBLE = (
    *(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError),
    *(TypeError, OverflowError, UnicodeEncodeError),
)


def read_rows(source: str, split: str = "train", field: str = "data.prompts") -> pa.Table:
    """All rows of the data set. Raises DataError that names `field`, the configuration's name of the source.

    Columns of images hold their bytes, so that nothing depends on files that lie elsewhere.
    """
    path = Path(source).expanduser()
    suffix = Path(source.removesuffix(".gz")).suffix
    if path.is_file():
        return _with_images(_read_file(path, suffix, field), path.parent, field)
    if not path.is_dir() and (suffix in _SUFFIXES or source.startswith((".", "/", "~"))):
        raise DataError(
            f"{field} must name a file that exists; got {source!r}. Check the path, which starts from here."
        )

    import datasets

    if not path.is_dir():
        try:
            rows = datasets.load_dataset(source, split=split)
        except Exception as error:
            raise DataError(
                f"{field} must name a file or a data set on the hub; {source!r} is no file here, and the hub said: "
                f"{first_line(error)}. Check the name, the split ({split!r}) and the network."
            ) from error
        return table_from(rows, field)
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{field}: {path} is not a folder that `datasets` saved: {first_line(error)}. Name a file in it."
        ) from error
    if isinstance(rows, dict):
        if split not in rows:
            raise DataError(f"{field}: there is no split {split!r}; there are {', '.join(rows)}. Set the split.")
        rows = rows[split]
    return _with_images(table_from(rows, field), path, field)


def table_from(rows: Any, field: str = "train_dataset") -> pa.Table:
    """The rows of a `datasets.Dataset`, a frame of pandas or Polars, a list of dictionaries, or an Arrow table.

    Nested values are kept as they are. Arrow's structs (a `datasets.Dataset` without Json features, Parquet) have the
    keys of all rows in each, None where a row has none; rewards see them as `dataset[i]` shows them.
    """
    if isinstance(rows, pa.Table):
        return with_plain_types(rows, field)
    if hasattr(rows, "with_format") and hasattr(rows, "data"):
        table = _from_datasets(rows, field)
    elif hasattr(rows, "to_dict") and hasattr(rows, "columns") and hasattr(rows, "dtypes") and hasattr(rows, "iloc"):
        columns = {}
        for name, values in rows.items():  # of pandas; columns of objects value by value: nested ones stay as they are
            if values.dtype != object:
                columns[str(name)] = pa.array(values, from_pandas=True)
            else:
                cells = [None if isinstance(cell, float) and cell != cell else _without_numpy(cell) for cell in values]
                columns[str(name)] = _column(cells, str(name), field)
        table = with_plain_types(pa.table(columns), field)
    elif hasattr(rows, "__arrow_c_stream__"):
        table = with_plain_types(pa.table(rows), field)
    else:
        listed = list(rows) if isinstance(rows, Iterable) else [rows]
        if all(isinstance(row, dict) for row in listed):
            table = _table_of_dicts(listed, field)
        elif all(isinstance(row, str) for row in listed) and not isinstance(rows, str):
            return pa.table({"prompt": _column(listed, "prompt", field)})
        else:
            raise DataError(
                f"{field} must be a datasets.Dataset, a pandas frame or a list of rows; got {type(rows).__name__}. "
                "Give a list of dictionaries with a 'prompt' key, for example."
            )
    return _with_images(table, Path(), field)


def _from_datasets(rows: Any, field: str) -> pa.Table:
    """What a `datasets.Dataset` shows: its chosen columns, and the output of its transform."""
    shown = rows.format
    if shown["type"] == "custom":  # of `with_transform`: only Python rows have passed through it
        return _table_of_dicts([*rows], field)
    columns = None if shown["output_all_columns"] else shown["columns"]
    table = rows.with_format("arrow", columns=columns)[:]
    return with_plain_types(table if isinstance(table, pa.Table) else pa.Table.from_batches(table.to_batches()), field)


def _without_numpy(cell: Any) -> Any:
    """The cell with arrays and numbers of NumPy as lists and numbers of Python (pandas reads lists of Parquet so)."""
    if type(cell).__module__ == "numpy" and hasattr(cell, "tolist"):
        return _without_numpy(cell.tolist())
    if isinstance(cell, list | tuple):
        return [_without_numpy(inner) for inner in cell]
    return {name: _without_numpy(inner) for name, inner in cell.items()} if isinstance(cell, dict) else cell


# -- types -----------------------------------------------------------------------------------------------------------


def with_plain_types(table: pa.Table, field: str) -> pa.Table:
    """The table in types that Parquet can hold: JSON as raftune's JsonType, views as whole arrays.

    Raises DataError for two columns of one name, and for a type that Parquet cannot hold.
    """
    _check_names(table.column_names, field)
    for index, (column, kind) in enumerate(zip(table.columns, table.schema.types, strict=True)):
        name = table.column_names[index]
        if isinstance(kind, pa.JsonType):
            texts = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
            array = pa.ExtensionArray.from_storage(JsonType(), texts.cast(pa.string()).combine_chunks())
        elif _is_plain(kind):
            continue
        else:
            array = _column([_with_json_parsed(cell, kind) for cell in column.to_pylist()], name, field)
        table = table.set_column(index, name, array)
    return table


def _check_names(names: Iterable[str], where: str) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{where} must have each column once; there are several {repeated[0]!r}. Rename them.")


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


def _with_json_parsed(cell: Any, kind: pa.DataType) -> Any:
    if cell is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(cell)
    if isinstance(cell, list) and hasattr(kind, "value_type"):
        return [_with_json_parsed(inner, kind.value_type) for inner in cell]
    if isinstance(cell, dict) and kinds.is_struct(kind):
        return {name: _with_json_parsed(inner, kind.field(name).type) for name, inner in cell.items()}
    return cell


def _with_images(table: pa.Table, base: Path, field: str) -> pa.Table:
    """The table with its columns of images as bytes: of `datasets`' form, or paths of files relative to `base`.

    A column of texts is one of paths where all of them have an image's suffix and at least one names a file. Raises
    DataError with the row of a file that is not there.
    """
    for index, name in enumerate(table.column_names):
        column, kind = table.column(name), table.column(name).type
        if kinds.is_string(kind) or kinds.is_large_string(kind):
            texts = column.drop_null()
            if not len(texts) or not is_picture(texts[0].as_py()):
                continue
            paths = texts.to_pylist()
            if not all(map(is_picture, paths)) or not any((base / Path(p).expanduser()).is_file() for p in paths):
                continue
        elif not (kinds.is_struct(kind) and {inner.name for inner in kind} == {"bytes", "path"}):
            continue
        images: list[bytes | None] = []
        for number, cell in enumerate(column.to_pylist(), 1):
            try:
                images.append(content_of(cell, base) if cell is not None and is_picture(cell) else None)
            except OSError as error:
                raise DataError(
                    f"{field}: the image in row {number} of the column {name!r} cannot be read: {error.strerror}: "
                    f"{error.filename}. Paths are relative to the data set: fix or remove the row."
                ) from error
        table = table.set_column(index, name, pa.array(images, pa.binary()))
    return table


# -- files -----------------------------------------------------------------------------------------------------------


def _read_file(path: Path, suffix: str, field: str) -> pa.Table:
    where = f"{field}: {path}"
    if suffix not in _SUFFIXES:
        raise DataError(
            f"{field} must end in one of {', '.join(_SUFFIXES)} (JSON may be gzipped); got {path.name!r}. Convert it."
        )
    try:
        if suffix == ".parquet":
            table = pq.read_table(path, page_checksum_verification=True)
            table.validate(full=True)  # texts that are not UTF-8 would fail only where they are read
            return with_plain_types(table, where)
        if suffix in JSON_SUFFIXES:
            return _table_of_dicts(_json_objects(path, field), where)
        return _read_csv(path, suffix, where)
    except (pa.ArrowException, ValueError, OSError, EOFError, OverflowError) as error:
        raise DataError(f"{field}: {path} cannot be read: {first_line(error)}. Fix the file.") from error


def raw_rows(source: str, split: str, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """Number and content of each row. Files of JSON lines and Parquet are streamed; blank lines are no rows."""
    path = Path(source).expanduser()
    suffix = Path(source.removesuffix(".gz")).suffix if path.is_file() else ""
    if suffix in JSON_SUFFIXES:
        yield from json_rows(path, field)
        return
    number = 0
    if suffix == ".parquet":
        batches = _parquet_batches(path, field)
    else:
        batches = iter(read_rows(source, split, field).to_batches(max_chunksize=BATCH))
    for batch in batches:
        # Arrow gives messages and tools the keys of all rows; an image is a dictionary and stays as it is.
        padded = [column.name for column in batch.schema if kinds.is_nested(column.type) and column.type != JsonType()]
        for row in batch.to_pylist():
            row |= {name: without_none(row[name]) for name in padded if isinstance(row[name], list)}
            if suffix in (".csv", ".tsv"):
                row |= {name: str(row[name]) for name in TEXTS if isinstance(row.get(name), int | float)}
            number += 1
            yield number, row


def _parquet_batches(path: Path, field: str) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield from with_plain_types(pa.Table.from_batches([batch]), f"{field}: {path}").to_batches()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{field}: {path} cannot be read: {first_line(error)}. Fix the file.") from error


def json_rows(path: Path, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """The rows of a file of JSON lines, read one by one, or of one JSON array; blank lines are no rows.

    The text is UTF-8, or UTF-16 with a byte order mark. A row is skipped unless it is an object of valid text.
    """
    try:
        with _open(path) as file:
            head = file.read(4096)
            file.seek(0)
            encoding = "utf-16" if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n")
            if head.decode(encoding, "ignore").lstrip()[:1] == "[":
                content = text.read()
                try:
                    entries = json.loads(content)
                except RecursionError as error:
                    message = f"{field}: {path}: entry 1 or a later one is nested too deeply to be read. Fix the file."
                    raise DataError(message) from error
                except ValueError as error:
                    raise DataError(f"{field}: {path} is not valid JSON: {first_line(error)}. Fix the file.") from error
                for number, entry in enumerate(entries, 1):
                    yield number, _checked(entry, content, number, f"entry {number}")
                return
            for number, line in enumerate(text, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.rstrip("\n"))
                except (ValueError, RecursionError) as error:
                    detail = f"line {number} is not valid JSON: {first_line(error)}"
                    yield number, SkippedRow(number, SkipReason.BROKEN, detail)
                else:
                    yield number, _checked(row, line, number, f"line {number}")
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise DataError(f"{field}: {path} cannot be read to its end: {first_line(error)}. Fetch it again.") from error


def _checked(row: Any, text: str, number: int, label: str) -> Row | SkippedRow:
    if not isinstance(row, dict):
        detail = f"{label} must be a JSON object; got {type(row).__name__}"
        return SkippedRow(number, SkipReason.WRONG_TYPE, detail)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except RecursionError:
        return SkippedRow(number, SkipReason.BROKEN, f"{label} is nested too deeply to be read")
    except UnicodeEncodeError as error:
        character = error.object[error.start]
        detail = f"{label} holds half of a surrogate pair, {character!a}, which is no text"
        if character in text:  # of the file itself, not of an escape in it: `surrogateescape` of a byte
            detail = f"{label} is not UTF-8 (byte {ord(character) - 0xDC00:#04x}): save the file as UTF-8"
        return SkippedRow(number, SkipReason.BROKEN, detail)
    return row


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_objects(path: Path, field: str) -> list[Row]:
    """The objects of JSON lines, or of one array. Raises DataError for the first row that cannot be read."""
    rows = []
    for number, row in json_rows(path, field):
        if not isinstance(row, SkippedRow):
            rows.append(row)
            continue
        if number == 1 and row.reason is SkipReason.BROKEN:
            with contextlib.suppress(ValueError, RecursionError), _open(path) as file:
                json.load(file)
                raise DataError(
                    f"{field}: {path} must hold one JSON object a line, or an array of objects; it holds a single "
                    'object over several lines. Write [{"prompt": …}, …].'
                )
        advice = f"Fix or remove the {'line' if 'is not valid JSON' in row.detail else 'row'}."
        if row.reason is SkipReason.WRONG_TYPE:
            advice = 'Write {"prompt": …}.'
        raise DataError(f"{field}: {path} {row.detail}. {advice}")
    return rows


def _read_csv(path: Path, suffix: str, where: str) -> pa.Table:
    """The columns as texts, but for those that hold nothing but numbers as Python writes them.

    So `007`, `4.50`, dates, `nan` and `true` are texts, and nothing in the file is lost: `str` gives it back. The
    delimiter is, of those that split the header, the one that splits all rows alike; else a comma.
    """
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where} line {line} is not UTF-8 (byte {content[error.start]:#04x}). Save the file as UTF-8."
        ) from error
    delimiter = "\t"
    if suffix == ".csv":
        widths = {}
        for candidate in (",", ";", "\t", "|"):
            counts = [len(row) for row in _first_rows(text, candidate, 20) if row]
            if counts and counts[0] > 1:
                widths[candidate] = (len(set(counts)) == 1, counts[0])
        delimiter = max(widths, key=widths.__getitem__, default=",")
    header = next(iter(_first_rows(text, delimiter, 1)), [])
    _check_names(header, where)
    content = text.encode()
    table = pyarrow.csv.read_csv(
        io.BytesIO(content),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 2**31 - 1)),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )
    return pa.table({name: _numbers_or_text(table.column(name).to_pylist()) for name in table.column_names})


def _first_rows(text: str, delimiter: str, count: int) -> list[list[str]]:
    """The first rows, whose cells may be of any length: Python's own limit is 131,072 characters."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        return list(itertools.islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), count))
    finally:
        csv.field_size_limit(limit)


def _numbers_or_text(cells: Sequence[str]) -> pa.Array:
    """The cells as numbers where all that are not empty are written as Python writes whole numbers, or others."""

    def is_decimal(cell: str) -> bool:
        try:
            return cell not in ("nan", "inf", "-inf") and repr(float(cell)) == cell
        except ValueError:
            return False

    filled = [cell for cell in cells if cell]
    if not filled:
        return pa.nulls(len(cells))
    if all(map(_INTEGER.fullmatch, filled)):
        return pa.array([int(cell) if cell else None for cell in cells], pa.int64())
    if all(map(is_decimal, filled)):
        return pa.array([float(cell) if cell else None for cell in cells], pa.float64())
    return pa.array(cells, pa.string())


# -- columns ---------------------------------------------------------------------------------------------------------


def _table_of_dicts(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    """The columns of every name that any row has. Raises DataError that names a row unlike those before it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({str(name): _column([row.get(name) for row in rows], name, where) for name in names})


def _column(values: Sequence[Any], name: str, where: str) -> pa.Array:
    cells = [png_of(value) if hasattr(value, "getextrema") else value for value in values]  # images of PIL
    if all(cell is None or (isinstance(cell, dict) and cell.keys() == {"bytes", "path"}) for cell in cells):
        return pa.array(cells)  # images, as `datasets` has them

    def fits(part: Sequence[Any]) -> bool:
        try:
            arrow_array(part)
        except _INCOMPATIBLE:
            return False
        return True

    try:
        return arrow_array(cells)
    except _INCOMPATIBLE as error:
        row = bisect.bisect_left(range(len(cells) + 1), True, key=lambda count: not fits(cells[:count]))
        cell = cells[row - 1]
        if isinstance(error, UnicodeEncodeError):
            raise DataError(
                f"{where}: row {row} of the column {name!r} holds half of a surrogate pair, which is no text: "
                f"{cell!a:.60}. Fix or remove the row."
            ) from error
        if not fits([cell]):
            raise DataError(
                f"{where}: the column {name!r} must hold texts, numbers, or lists and dictionaries of them; row {row} "
                f"holds {cell!r:.60}, a {type(cell).__name__}. Fix the row."
            ) from error
        raise DataError(
            f"{where}: the column {name!r} must hold values of one kind; row {row} holds {cell!r:.60}, "
            "unlike those before it. Fix the row."
        ) from error
