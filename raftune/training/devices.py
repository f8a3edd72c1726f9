"""Chooses the device of a model, and recognises out-of-memory errors of any device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch

from raftune.errors import ConfigError, OutOfMemory


def devices() -> list[str]:
    """The devices that torch can use here, the best first; the CPU is always there."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose_device(spec: str, field: str = "policy.device") -> torch.device:
    """The device that the field names; auto is the first of CUDA, MPS and CPU that is there.

    Raises ConfigError for an unknown device, one that this machine lacks, and for a policy on another than the first
    visible one, on which transformers' Trainer trains.
    """
    available = devices()
    try:
        device = torch.device(available[0].split(":")[0] if spec == "auto" else spec)
    except RuntimeError:
        raise ConfigError(
            f"{field} must be auto, cpu, cuda, cuda:N or mps; got {spec!r}. Write auto: the best that is there."
        ) from None
    if (device.index or 0) >= sum(name.split(":")[0] == device.type for name in available):
        raise ConfigError(
            f"{field} must be a device of this machine; got {spec!r}, and there is {', '.join(available)}. "
            "Write one of these, or auto."
        )
    if device.index and field == "policy.device":
        raise ConfigError(
            f"policy.device must be the first visible one; got {spec!r}. Set CUDA_VISIBLE_DEVICES={device.index} and "
            "write cuda."
        )
    return device


def upload(values: npt.NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The values on the device. The call does not wait for a CUDA device: it copies from pinned memory."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if pinned else tensor.to(device)


def is_out_of_memory(error: BaseException) -> bool:
    """True of the errors that CUDA, MPS, the CPU allocator and Python raise when memory runs out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextmanager
def names_out_of_memory(batch_size: int, smaller: str) -> Iterator[None]:
    """Turns a device's error about memory into OutOfMemory, and releases the tensors of the failed call.

    `smaller` names other fields that may be lowered.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors for as long as the error lives
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise OutOfMemory(
            f"sampling.batch_size must leave room in the device's memory; got {batch_size} rows ({reason}). "
            f"Set a smaller sampling.batch_size or {smaller}.",
            batch_size,
        ) from None
