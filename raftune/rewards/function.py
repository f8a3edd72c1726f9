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
from raftune.rewards.batch import is_image

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
        inner = function
        while isinstance(inner, partial):
            inner = inner.func
        if name is None:
            own = getattr(inner, "__name__", None) or type(inner).__name__
            name = derived_name("lambda" if own == "<lambda>" else own)
        self.name, self.function = name, function
        self.options = expanded(dict(options or {}), f"rewards.options of {name!r}")
        self.media = frozenset(getattr(function, "media", ANY_MEDIA))
        self.fingerprint = fingerprint.digest(
            code or fingerprint.of_callable(function), fingerprint.describe(dict(options or {}))
        )
        call = getattr(inner, "__call__", None)  # noqa: B004, an object's is asked for
        self.is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)
        try:
            parameters = list(inspect.signature(function).parameters.values())
            takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        except (TypeError, ValueError):  # it does not say
            parameters, takes_all = [], True
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._required = [p.name for p in named if p.default is p.empty]
        accepts = frozenset(p.name for p in named if p.kind is not p.POSITIONAL_ONLY)
        self.accepts = None if takes_all else accepts  # the keywords that the function takes; None: all

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
        copies = [value.copy() if is_image(value) else value for value in completions]  # images can be changed
        arguments = {**columns, "prompts": prompts, "completions": copies, **self.options}
        if missing := [name for name in self._required if name not in arguments]:
            have = ", ".join(sorted(arguments))
            raise ConfigError(f"reward {self.name!r} needs {missing[0]!r}, which is not passed; there are: {have}")
        if self.accepts is not None:
            names = self.accepts | self.options.keys()
            arguments = {name: value for name, value in arguments.items() if name in names}
        return self.function(**arguments)
