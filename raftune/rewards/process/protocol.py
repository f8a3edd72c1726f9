"""Messages between a run and a reward's process, as Arrow IPC streams.

Nothing is pickled. A value is JSON text, so that a message or a nested cell arrives with exactly its own keys; images
are PNG bytes, and what JSON does not hold is an Arrow column.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from raftune.data.images import as_rgb, image_of
from raftune.errors import RewardError
from raftune.rewards.batch import RewardBatch, is_image


def packed(header: Mapping[str, Any], table: pa.Table | None = None) -> memoryview:
    """One message as bytes: a header of JSON values, and rows."""
    table = pa.table({}) if table is None else table
    kinds = (table.schema.metadata or {}).get(b"columns", b"{}").decode()
    table = table.replace_schema_metadata({"header": json.dumps(header, default=str), "columns": kinds})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def unpacked(payload: bytes) -> tuple[dict[str, Any], pa.Table]:
    with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
        table = reader.read_all()
    header: dict[str, Any] = json.loads(table.schema.metadata[b"header"])
    return header, table


def batch_table(batch: RewardBatch) -> pa.Table:
    """The samples as rows; `batch_from` gives the same batch back."""
    lists: dict[str, list[Any]] = {f"column/{name}": values for name, values in batch.columns.items()}
    lists |= {"prompts": batch.prompts, "completions": batch.completions}
    encoded = {name: _encode(name, values) for name, values in lists.items()}
    if batch.completion_ids is not None:
        encoded["completion_ids"] = (pa.array(batch.completion_ids, pa.list_(pa.int64())), "arrow")
    kinds = json.dumps({name: kind for name, (_, kind) in encoded.items()})
    table = pa.table({name: array for name, (array, _) in encoded.items()})
    return table.replace_schema_metadata({"columns": kinds})


def batch_from(table: pa.Table, state: Mapping[str, Any]) -> RewardBatch:
    kinds = json.loads(table.schema.metadata[b"columns"])
    lists = {name: _decode(table.column(name), kind) for name, kind in kinds.items()}
    columns = {name.removeprefix("column/"): values for name, values in lists.items() if name.startswith("column/")}
    return RewardBatch(lists["prompts"], lists["completions"], columns, lists.get("completion_ids"), dict(state))


def _encode(name: str, values: list[Any]) -> tuple[pa.Array, str]:
    """The column as Arrow, and how it is read back: png, json or arrow."""
    if values and all(is_image(value) for value in values):
        buffers = [io.BytesIO() for _ in values]
        for value, buffer in zip(values, buffers, strict=True):  # hardly compressed: it is read again at once
            as_rgb(value).save(buffer, format="PNG", compress_level=1)
        return pa.array([buffer.getvalue() for buffer in buffers], pa.binary()), "png"
    with contextlib.suppress(TypeError, ValueError):
        texts = pa.lib.StringBuilder()  # pa.array imports pandas
        texts.append_values([json.dumps(value) for value in values])
        return texts.finish(), "json"
    with contextlib.suppress(pa.ArrowException, TypeError, ValueError):  # bytes, dates, decimals and the like
        array = pa.array(values)
        if array.to_pylist() == values:
            return array, "arrow"
    kind = next(type(value).__name__ for value in values if value is not None)
    raise RewardError(
        f"{name} holds values (of type {kind}) that cannot be sent to a reward in its own process. "
        "Give the reward as a function object, or the column as text, numbers or lists."
    )


def _decode(column: pa.ChunkedArray, kind: str) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if kind == "png":
        return [image_of(value) for value in values]
    return [json.loads(value) for value in values] if kind == "json" else values
