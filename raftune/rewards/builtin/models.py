"""Helpers of rewards that are models: device, quiet loading and hashes of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from raftune.errors import ConfigError
from raftune.rewards import fingerprint


def best_device(device: str, field: str = "rewards.device") -> str:
    """The device itself; for `auto` the first of CUDA, MPS and CPU that is there.

    Raises ConfigError that names `field` for a device that this machine lacks, and for what is no device.
    """
    there = devices()
    if device == "auto":
        return there[0].split(":")[0]
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"{field} must be auto, cpu, cuda, cuda:N or mps; got {device!r}. Write auto: the best that is there."
        ) from None
    known = {name.split(":")[0] for name in there}
    if asked.type not in known or (asked.index or 0) >= sum(name.startswith(asked.type) for name in there):
        raise ConfigError(
            f"{field} must be a device of this machine; got {device!r}, and there is {', '.join(there)}. "
            "Write one of these, or auto."
        )
    return device


def devices() -> list[str]:
    """The devices that torch can use here, the best first; the CPU is always there."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers draws no progress bars: the run's own would be torn apart."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def weights_fingerprint(source: str, config: Any, revision: str | None, model: Any = None) -> str:
    """The hash of a folder's files, a hub model's name and commit, or of the numbers of a model given as an object."""
    if model is not None:
        state = sorted(model.state_dict().items())
        return fingerprint.digest([[key, fingerprint.of_bytes(_bytes(tensor))] for key, tensor in state])
    folder = Path(source).expanduser()
    if folder.is_dir():
        return fingerprint.of_folder(folder)
    return f"{source}@{getattr(config, '_commit_hash', None) or revision}"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
