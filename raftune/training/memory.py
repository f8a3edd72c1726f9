"""Recognises out-of-memory errors of any device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raftune.errors import OutOfMemory


def is_out_of_memory(error: BaseException) -> bool:
    """True of what CUDA, MPS, the CPU allocator and Python raise when memory runs out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextmanager
def names_out_of_memory(batch_size: int, smaller: str) -> Iterator[None]:
    """A device's complaint about memory becomes OutOfMemory, and the tensors of the failed call are let go.

    `smaller` names what else may be made smaller.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors, for as long as anyone holds the error
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutOfMemory(
            f"sampling.batch_size must leave room in the device's memory; got {batch_size} rows ({said}). "
            f"Set a smaller sampling.batch_size or {smaller}.",
            batch_size,
        ) from None
