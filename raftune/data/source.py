"""Iterates over the raw rows of a source. Broken JSON lines are skipped and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from raftune.data.rows import Feedback, SkippedRow, SkipReason, T, UnusableRow, reasons
from raftune.data.tables import JSON_SUFFIXES, json_rows, read_rows, with_plain_types
from raftune.errors import DataError
from raftune.records import JsonType, Row, without_none
from raftune.sanitize import first_line

TEXTS = ("completion", "response", "answer", "chosen", "rejected")  # columns whose numbers in a CSV file stay texts
BATCH = 1024  # rows of an Arrow table that are Python objects at the same time


def collect(
    source: str,
    split: str,
    field: str,
    read: Callable[[int, Row], tuple[str, Iterable[T]]],
    wanted: str,
    columns: Mapping[str, str] | None = None,
) -> Feedback[T]:
    """All rows of the source as `read` parses them into the name of their format and records.

    `wanted` describes a usable row; `columns` maps a name to the column of the data with its values. Raises DataError
    that names `field` where no row is usable.
    """
    rows: list[T] = []
    skipped: list[SkippedRow] = []
    formats: Counter[str] = Counter()
    columns = columns or {}
    replaced = {*columns, *columns.values()}
    for number, raw in raw_rows(source, split, field):
        if isinstance(raw, SkippedRow):
            skipped.append(raw)
            continue
        try:
            if missing := [column for column in columns.values() if column not in raw]:
                raise UnusableRow(
                    SkipReason.MISSING, f"there is no column {missing[0]!r} (columns) among {', '.join(raw)}"
                )
            others = {name: cell for name, cell in raw.items() if name not in replaced}
            form, records = read(number, {name: raw[column] for name, column in columns.items()} | others)
            rows.extend(records)
            formats[form] += 1
        except UnusableRow as error:
            skipped.append(SkippedRow(number, error.reason, error.detail))
    if not rows and not skipped:
        raise DataError(f"{field} must hold at least one row; {source} is empty. {wanted}")
    if not rows:
        raise DataError(
            f"{field} must hold at least one usable row; all {len(skipped):,} of {source} were skipped: "
            f"{'; '.join(reasons(skipped))} ({skipped[0].detail}). {wanted}"
        )
    return Feedback(rows, skipped, " and ".join(form for form, _ in formats.most_common()), source)


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
