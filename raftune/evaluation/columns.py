"""Columns of a table of samples as arrays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray


def prompt_numbers(samples: pa.Table) -> IntArray:
    """For each row the number of its prompt, in order of appearance."""
    codes = samples.column("prompt_id").combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return np.asarray(codes.indices.to_numpy(), dtype=np.int64)


def numbers_of(samples: pa.Table, name: str) -> FloatArray:
    """The column as numbers, NaN where it is null."""
    return np.asarray(pc.cast(samples.column(name), pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
