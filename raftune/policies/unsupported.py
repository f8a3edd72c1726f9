"""Refuses options that a family does not support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from raftune.config.sampling import SamplingConfig
from raftune.config.training import TrainingConfig
from raftune.errors import ConfigError


class FamilyConfig(Protocol):
    """The parts of a run's configuration that shape a family."""

    @property
    def policy(self) -> Any: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def seed(self) -> int: ...


def refuse_unused(config: Any, family: str, unused: Iterable[str]) -> None:
    """Raises ConfigError where one of these dotted fields was changed from its default."""
    for path in unused:
        section, _, name = path.rpartition(".")
        holder = getattr(config, section) if section else config
        if not hasattr(holder, name):  # a partial configuration, as of an evaluation
            continue
        value, default = getattr(holder, name), type(holder).model_fields[name].get_default(call_default_factory=True)
        if value == default:
            continue
        shown = repr(value)
        if fields := getattr(type(value), "model_fields", ()):  # a section: its changed fields
            pairs = ((field, getattr(value, field), getattr(default, field, None)) for field in fields)
            shown = ", ".join(f"{field} = {new!r}" for field, new, usual in pairs if new != usual)
        raise ConfigError(
            f"{path} means nothing to the {family} family; got {shown}. Remove it, or choose another policy.family."
        )


def all_but(section: Any, prefix: str, read: Iterable[str]) -> list[str]:
    """The dotted names of the section's fields, without those that are read."""
    kept = set(read)
    return [f"{prefix}.{name}" for name in type(section).model_fields if name not in kept]
