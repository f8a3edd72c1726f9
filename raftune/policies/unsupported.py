"""Refuses options that a family does not support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from raftune.config.sampling import SamplingConfig
from raftune.config.training import TrainingConfig
from raftune.errors import ConfigError


class FamilyConfig(Protocol):
    """What of a run's configuration shapes a family."""

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
        if not hasattr(holder, name):  # a part of a configuration: what measures a model has no options of a run
            continue
        given = getattr(holder, name)
        default = type(holder).model_fields[name].get_default(call_default_factory=True)
        if given != default:
            raise ConfigError(
                f"{path} means nothing to the {family} family; got {_shown(given, default)}. "
                "Remove it, or choose another policy.family."
            )


def all_but(section: Any, prefix: str, read: Iterable[str]) -> list[str]:
    """The dotted names of the section's fields, without those that are read."""
    kept = set(read)
    return [f"{prefix}.{name}" for name in type(section).model_fields if name not in kept]


def _shown(given: Any, default: Any) -> str:
    """The value; of a section, those of its fields that were changed."""
    if not hasattr(type(given), "model_fields"):
        return repr(given)
    changed = {name: getattr(given, name) for name in type(given).model_fields}
    told = [f"{name} = {value!r}" for name, value in changed.items() if value != getattr(default, name, None)]
    return ", ".join(told)
