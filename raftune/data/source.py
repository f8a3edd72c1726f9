"""Iterates over the raw rows of a source. Broken JSON lines are skipped and reported."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from raftune.data.rows import Feedback, NumberedRow, SkippedRow, SkipReason, UnusableRow, reasons
from raftune.data.tables import read_rows, with_plain_types
from raftune.errors import DataError
from raftune.records import JsonType, Row, without_none
from raftune.sanitize import first_line

T = TypeVar("T", bound=NumberedRow)
LINES = (".jsonl", ".ndjson", ".json")
ANSWERS = ("completion", "response", "answer", "chosen", "rejected")
BATCH = 1024  # rows of an Arrow table that are Python objects at the same time


def collect(
    source: str,
    split: str,
    field: str,
    read: Callable[[int, Row], tuple[str, Iterable[T]]],
    wanted: str,
    columns: Mapping[str, str] | None = None,
) -> Feedback[T]:
    """Every row of the source as `read` understands it: the name of its format, and what it holds.

    `wanted` says what a usable row looks like; `columns` which column of the data is meant by a name. Raises DataError
    that names `field` where no row is usable.
    """
    rows: list[T] = []
    skipped: list[SkippedRow] = []
    formats: Counter[str] = Counter()
    for number, raw in raw_rows(source, split, field):
        if isinstance(raw, SkippedRow):
            skipped.append(raw)
            continue
        try:
            form, found = read(number, renamed(raw, columns or {}))
            rows.extend(found)
        except UnusableRow as why:
            skipped.append(SkippedRow(number, why.reason, why.detail))
        else:
            formats[form] += 1
    if not rows:
        raise DataError(nothing_usable(source, field, skipped, wanted))
    return Feedback(rows, skipped, " and ".join(form for form, _ in formats.most_common()), source)


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under the names that are read. Raises Unusable where it lacks a column that is named."""
    if not columns:
        return row
    if missing := [column for column in columns.values() if column not in row]:
        raise UnusableRow(SkipReason.MISSING, f"there is no column {missing[0]!r} (columns) among {', '.join(row)}")
    others = {name: cell for name, cell in row.items() if name not in columns and name not in columns.values()}
    return {name: row[column] for name, column in columns.items()} | others


def nothing_usable(source: str, field: str, skipped: list[SkippedRow], wanted: str) -> str:
    if not skipped:
        return f"{field} must hold at least one row; {source} is empty. {wanted}"
    details = f"all {len(skipped):,} of {source} were skipped: {'; '.join(reasons(skipped))} ({skipped[0].detail})"
    return f"{field} must hold at least one usable row; {details}. {wanted}"


def raw_rows(source: str, split: str, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """Number and content of each row. Files of JSON lines and Parquet are streamed; blank lines are no rows."""
    path = Path(source).expanduser()
    suffix = Path(source.removesuffix(".gz")).suffix
    if path.is_file() and suffix in LINES:
        yield from json_rows(path, field)
        return
    batches = parquet_batches(path, field) if path.is_file() and suffix == ".parquet" else None
    written = path.is_file() and suffix in (".csv", ".tsv")
    number = 0
    for batch in batches or read_rows(source, split, field).to_batches(max_chunksize=BATCH):
        padded = [column.name for column in batch.schema if kinds.is_nested(column.type) and column.type != JsonType()]
        for row in batch.to_pylist():
            for name in padded:  # messages and tools, with the keys of all rows in each; an image is a dictionary
                if isinstance(row[name], list):
                    row[name] = without_none(row[name])
            number += 1
            yield number, {name: as_written(name, cell) for name, cell in row.items()} if written else row


def as_written(name: str, cell: Any) -> Any:
    """The cell of a CSV file, of an answer as the text that the file says: a column of numbers gives it back."""
    return str(cell) if name in ANSWERS and isinstance(cell, int | float) else cell


def parquet_batches(path: Path, field: str) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(BATCH, use_threads=False):
                yield from with_plain_types(pa.Table.from_batches([batch]), f"{field}: {path}").to_batches()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{field}: {path} cannot be read: {first_line(error)}. Fix the file.") from error


def json_rows(path: Path, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """The rows of a file of JSON lines, or of one JSON array."""
    try:
        with opened(path) as file:
            if is_array(file):
                for number, row in enumerate(whole(file, path, field), 1):
                    yield number, checked(number, row)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parsed(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{field}: {path} cannot be read to its end: {first_line(error)}. Fetch it again.") from error


def opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def is_array(file: BinaryIO) -> bool:
    """Whether the file holds one JSON array rather than lines of objects."""
    head = file.read(4096)
    file.seek(0)
    return head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def whole(file: BinaryIO, path: Path, field: str) -> list[Any]:
    try:
        rows: list[Any] = json.loads(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{field}: {path} is not valid JSON: {first_line(error)}. Fix the file.") from error
    return rows


def parsed(number: int, line: bytes) -> Row | SkippedRow:
    """The line's object, or why there is none."""
    try:
        return checked(number, json.loads(line.decode("utf-8")))
    except (ValueError, RecursionError) as error:
        return SkippedRow(number, SkipReason.BROKEN, f"not valid JSON: {first_line(error)}")


def checked(number: int, row: Any) -> Row | SkippedRow:
    """The row, unless it is no object, or its text cannot be written as UTF-8 (half of a surrogate pair)."""
    if not isinstance(row, dict):
        return SkippedRow(number, SkipReason.WRONG_TYPE, f"a row must be a JSON object; got {type(row).__name__}")
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return SkippedRow(number, SkipReason.BROKEN, f"half of a surrogate pair, {error.object[error.start]!a}")
    return row
