"""Chooses the device of a policy."""

from __future__ import annotations

import torch

from raftune.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """The device that `policy.device` stands for: auto takes CUDA, then MPS, then the CPU."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"policy.device must be auto, cpu, cuda or mps; got {wanted!r}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"policy.device must be auto, cpu, cuda or mps; got {wanted!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"policy.device must exist here; got {wanted!r}, and torch sees no CUDA device. Write auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"policy.device must exist here; got {wanted!r}, and torch sees no MPS device. Write auto.")
    if device.index:  # transformers' Trainer always takes the first visible device
        raise ConfigError(
            f"policy.device must be the first visible one; got {wanted!r}. Set CUDA_VISIBLE_DEVICES={device.index} and "
            "write cuda."
        )
    return device
