"""Converts clean latents to and from Parquet columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raftune.errors import DataError
from raftune.records import LATENTS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIELDS = (
    pa.field(LATENTS, pa.binary()),
    pa.field("latents_shape", pa.list_(pa.int32())),
    pa.field("latents_dtype", pa.string()),
)
NONE: Mapping[str, Any] = {field.name: None for field in FIELDS}


def columns_of(x0: torch.Tensor) -> dict[str, Any]:
    """One image's latents (C, h, w) as little-endian bytes, with their shape and the dtype that was generated."""
    plain = x0.detach().cpu().contiguous()
    bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain  # numpy has no bfloat16
    array = bits.numpy()
    content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {
        LATENTS: content,
        "latents_shape": list(plain.shape),
        "latents_dtype": str(plain.dtype).removeprefix("torch."),
    }


def latents_of(content: bytes, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """The latents that `columns_of` wrote. Raises DataError where the bytes do not fill that shape."""
    if dtype not in DTYPES:
        raise DataError(f"latents_dtype must be {', '.join(DTYPES)}; got {dtype!r}.")
    width = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}[dtype]
    array = np.frombuffer(content, dtype=width)
    if array.size != int(np.prod(shape)):
        raise DataError(
            f"latents of the shape {tuple(shape)} must hold {int(np.prod(shape))} numbers; got {array.size}."
        )
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).reshape(tuple(shape))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
