"""Rewards that are callables: function, lambda, partial, or object; sync or async."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from raftune.config.rewards import derived_name
from raftune.config.secrets import expanded
from raftune.errors import ConfigError
from raftune.rewards import fingerprint
from raftune.rewards.media import is_image

ANY_MEDIA = frozenset({"text", "messages", "image", "category"})


class FunctionReward:
    """Calls the function as TRL does, by keyword; one that takes no `**kwargs` gets only the keywords it names.

    `options` are further keyword arguments; they win over columns of the same name.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        code: str | None = None,
    ) -> None:
        if not callable(function):
            raise ConfigError(
                f"reward_funcs must hold callables, models or specs; got {type(function).__name__} {function!r}. "
                "Give a function that takes prompts and completions by keyword and returns a list of numbers."
            )
        self.name = name or name_of(function)
        self.function, self.options = function, expanded(dict(options or {}), f"rewards.options of {self.name!r}")
        self.media = frozenset(getattr(function, "media", ANY_MEDIA))
        self.fingerprint = fingerprint.digest(
            code or fingerprint.of_callable(function), fingerprint.describe(dict(options or {}))
        )
        self.accepts, self.is_async = accepted(function), is_async(function)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        answers = [one.copy() if is_image(one) else one for one in completions]  # images can be changed
        given = {**columns, "prompts": prompts, "completions": answers, **self.options}
        self._need(given)
        if self.accepts is not None:
            given = {name: value for name, value in given.items() if name in self.accepts or name in self.options}
        return self.function(**given)

    def _need(self, given: Mapping[str, Any]) -> None:
        if missing := [name for name in required(self.function) if name not in given]:
            have = ", ".join(sorted(given))
            raise ConfigError(f"reward {self.name!r} needs {missing[0]!r}, which is not passed; there are: {have}")


def name_of(function: Any) -> str:
    """The function's own name: through partials, of the class for an object, `lambda` for a lambda."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return derived_name("lambda" if name == "<lambda>" else name)


def is_async(function: Any) -> bool:
    """True of coroutine functions, of partials of one, and of objects whose `__call__` is one."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def accepted(function: Any) -> frozenset[str] | None:
    """The keywords that the function takes; None where it takes all, or does not tell."""
    parameters = _parameters(function)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required(function: Any) -> list[str]:
    """The keywords without which the function cannot be called."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(function) or [] if p.default is p.empty and p.kind in kinds]


def _parameters(function: Any) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
