"""Registry of built-in rewards, filled by the decorator `@builtin`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from raftune.rewards.fingerprint import digest

T = TypeVar("T")
BUILT_IN: dict[str, BuiltinReward] = {}


@dataclass(frozen=True)
class RewardOption:
    """One option of a reward. `default` is None if the option is required."""

    name: str
    type: str
    meaning: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class BuiltinReward:
    """A built-in reward: the dataclass whose fields are its options, what it scores, options to try it with.

    own_process: whether its calls can only be ended from outside. model_type: that of folders which are its spec.
    """

    name: str
    options: type[Any]
    media: tuple[str, ...]
    example: Mapping[str, Any]
    own_process: bool = False
    model_type: str | None = None

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring."""
        return self._paragraphs()[0]

    @property
    def details(self) -> list[str]:
        """The other paragraphs of the docstring."""
        return self._paragraphs()[1:]

    def _paragraphs(self) -> list[str]:
        return [" ".join(text.split()) for text in (self.options.__doc__ or "").strip().split("\n\n")]

    def option_list(self) -> list[RewardOption]:
        """The options in the order in which they are declared."""
        hints = typing.get_type_hints(self.options, include_extras=True)
        options = []
        for field in dataclasses.fields(self.options):
            if field.init:
                hint = hints[field.name]
                annotated = typing.get_origin(hint) is typing.Annotated
                kind, *notes = typing.get_args(hint) if annotated else [hint]
                meaning = next((note.description for note in notes if hasattr(note, "description")), "")
                default: Any = field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                required = default is dataclasses.MISSING
                default = None if required else default
                options.append(RewardOption(field.name, _in_words(kind), meaning, required, default))
        return options


class BuiltInReward:
    """Base class of built-in rewards. Raise `version` when the reward computes something else."""

    name: str
    media: frozenset[str]
    version = 1

    @cached_property
    def fingerprint(self) -> str:
        """Over the built-in name, the version and all options."""
        return digest(type(self).name, self.version, *dataclasses.astuple(cast(Any, self)))

    def load(self, name: str | None = None, device: str = "auto") -> Self:
        """Sets the name and reads what the reward needs besides its options; a model's weights are read later."""
        self.name = name or self.name
        return self


def builtin(
    name: str,
    *,
    media: tuple[str, ...],
    example: Mapping[str, Any],
    own_process: bool = False,
    model_type: str | None = None,
) -> Callable[[type[T]], type[T]]:
    """Declares the decorated dataclass as the built-in reward of this name."""

    def declare(options: type[T]) -> type[T]:
        BUILT_IN[name] = BuiltinReward(name, options, media, example, own_process, model_type)
        if issubclass(options, BuiltInReward):
            options.name, options.media = name, frozenset(media)
        return options

    return declare


def import_all() -> None:
    """Imports every file of builtin/ that declares a reward; none of these imports torch."""
    for path in sorted((Path(__file__).parent / "builtin").glob("*.py")):
        if "\n@builtin(" in path.read_text(encoding="utf-8"):
            importlib.import_module(f"{__package__}.builtin.{path.stem}")


def nearest(name: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant."""
    close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=cutoff)
    return close[0] if close else None


def _in_words(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_in_words(part) for part in typing.get_args(kind))
    if origin is not None:
        inner = [_in_words(part) for part in typing.get_args(kind) if part is not Ellipsis]
        return f"{origin.__name__} of {inner[0] if len(set(inner)) == 1 else ', '.join(inner)}"
    return "null" if kind is type(None) else str(getattr(kind, "__name__", kind))
