"""Chooses the device of a model."""

from __future__ import annotations

import torch

from raftune.errors import ConfigError


def devices() -> list[str]:
    """The devices that torch can use here, the best first; the CPU is always there."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*found, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose_device(wanted: str, field: str = "policy.device") -> torch.device:
    """The device that the field stands for: auto takes the first of CUDA, MPS and CPU that is there.

    Raises ConfigError for what is no device, for one that this machine lacks, and where a policy, which transformers'
    Trainer trains on the first visible device, is to be on another.
    """
    there = devices()
    try:
        device = torch.device(there[0].split(":")[0] if wanted == "auto" else wanted)
    except RuntimeError:
        raise ConfigError(
            f"{field} must be auto, cpu, cuda, cuda:N or mps; got {wanted!r}. Write auto: the best that is there."
        ) from None
    known = {name.split(":")[0] for name in there}
    if device.type not in known or (device.index or 0) >= sum(name.startswith(device.type) for name in there):
        raise ConfigError(
            f"{field} must be a device of this machine; got {wanted!r}, and there is {', '.join(there)}. "
            "Write one of these, or auto."
        )
    if device.index and field == "policy.device":
        raise ConfigError(
            f"policy.device must be the first visible one; got {wanted!r}. Set CUDA_VISIBLE_DEVICES={device.index} and "
            "write cuda."
        )
    return device
