"""Registry of built-in rewards, filled by the decorator `@builtin`."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from raftune.protocols import Reward
from raftune.rewards.fingerprint import digest

T = TypeVar("T", bound="type[BuiltInReward]")
_DECLARED: dict[str, type[BuiltInReward]] = {}
MEDIA = frozenset({"text", "messages", "image"})
TYPES = {str: "text", int: "integer", float: "number", bool: "true | false", tuple: "list", type(None): "null"}


@dataclass(frozen=True)
class RewardOption:
    """One option of a reward. `default` is None if the option is required."""

    name: str
    type: str
    meaning: str
    required: bool
    default: Any = None


class BuiltInReward(Reward):
    """Base class of built-in rewards: dataclasses whose fields are the options, and whose docstring is the help.

    The decorator sets the attributes. Raise `version` when the reward computes something else.
    """

    example: Mapping[str, Any]  # options to try it with
    own_process: bool  # whether its calls can only be ended from outside
    model_type: str | None  # in the config.json of the folders that stand for this reward as a spec
    summary: str  # the first paragraph of the docstring
    details: list[str]  # the others
    version = 1

    @cached_property
    def fingerprint(self) -> str:
        """Over the built-in name, the version and all options."""
        return digest(type(self).name, self.version, *dataclasses.astuple(cast(Any, self)))

    def load(self, name: str | None = None, device: str = "auto") -> Self:
        """Sets the name and reads what the reward needs besides its options; a model's weights are read later."""
        self.name = name or self.name
        return self

    @classmethod
    def option_list(cls) -> list[RewardOption]:
        """The options in the order in which they are declared."""
        hints = typing.get_type_hints(cls, include_extras=True)
        options = []
        for field in dataclasses.fields(cast(Any, cls)):
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


def builtin(
    name: str,
    *,
    media: tuple[str, ...],
    example: Mapping[str, Any],
    own_process: bool = False,
    model_type: str | None = None,
) -> Callable[[T], T]:
    """Declares the decorated dataclass as the built-in reward of this name; media: of text, messages, image."""

    def declare(reward: T) -> T:
        other = _DECLARED.get(name, reward)
        for wrong, fix in (
            ("__dataclass_fields__" not in vars(reward), "put @dataclass below @builtin"),
            (not set(media) <= MEDIA, f"media must be a tuple of {', '.join(sorted(MEDIA))}"),
            ((reward.__doc__ or "").startswith(f"{reward.__name__}("), "write a docstring: it is the help"),
            (other.__qualname__ != reward.__qualname__, f"{other.__qualname__} has this name already"),
        ):
            if wrong:
                raise TypeError(f"built-in reward {name!r}: {fix}")
        reward.name, reward.media, reward.example = name, frozenset(media), example
        reward.own_process, reward.model_type = own_process, model_type
        paragraphs = (reward.__doc__ or "").strip().split("\n\n")
        reward.summary, *reward.details = [" ".join(text.split()) for text in paragraphs]
        _DECLARED[name] = reward
        return reward

    return declare


@cache
def built_in() -> dict[str, type[BuiltInReward]]:
    """The built-in rewards by name. None of the files that declare one, which are imported now, imports torch."""
    for path in sorted((Path(__file__).parent / "builtin").glob("*.py")):
        if "\n@builtin(" in path.read_text(encoding="utf-8"):
            importlib.import_module(f"{__package__}.builtin.{path.stem}")
    return _DECLARED


def _in_words(kind: Any) -> str:
    """The type as YAML has it: `number | null` for `float | None`."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_in_words(part) for part in typing.get_args(kind))
    if origin is not None:
        inner = dict.fromkeys(_in_words(part) for part in typing.get_args(kind) if part is not Ellipsis)
        return f"{TYPES.get(origin, origin.__name__)} of {', '.join(inner)}"
    return TYPES.get(kind) or str(getattr(kind, "__name__", kind))
