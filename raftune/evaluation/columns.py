"""Columns of a table of samples as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray


def numbers_by_key(keys: pa.Array | pa.ChunkedArray) -> IntArray:
    """For each key the number of its value, in order of appearance."""
    codes = (keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys).dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return np.asarray(codes.indices.to_numpy(), dtype=np.int64)


def prompt_numbers(samples: pa.Table) -> IntArray:
    """For each row the number of its prompt, in order of appearance."""
    return numbers_by_key(samples.column("prompt_id"))


def numbers_of(samples: pa.Table, name: str) -> FloatArray:
    """The column as numbers, NaN where it is null."""
    return np.asarray(pc.cast(samples.column(name), pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
