"""Reward `regex`: one number for a match, another for none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.errors import ConfigError
from raftune.rewards.builtin.text import text_of
from raftune.rewards.fingerprint import digest
from raftune.rewards.registry import BuiltInReward, builtin


# A pattern can take exponential time while it holds the interpreter's lock: only another process can be ended then.
@builtin("regex", media=("text", "messages"), example={"pattern": "(?i)thank you"}, own_process=True)
@dataclass
class RegexReward(BuiltInReward):
    """`match` if the pattern is found, else `otherwise`; with mode `count`, `match` times the number of matches."""

    pattern: Annotated[
        str,
        Field(
            description="A Python regular expression. Flags are inline: `(?i)` ignores case, `(?s)` lets a dot match "
            "line breaks."
        ),
    ]
    match: Annotated[float, Field(description="The reward of a match.")] = 1.0
    otherwise: Annotated[float, Field(description="The reward without a match.")] = 0.0
    mode: Annotated[
        Literal["search", "fullmatch", "count"],
        Field(
            description="search: anywhere; fullmatch: the whole completion; count: number of non-overlapping matches."
        ),
    ] = "search"

    def __post_init__(self) -> None:
        try:
            self._compiled = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"regex: pattern must be a regular expression; got {self.pattern!r}: {error}") from None
        self.fingerprint = digest("regex", 1, self.pattern, self.match, self.otherwise, self.mode)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return [self._value(text_of(completion)) for completion in completions]

    def _value(self, text: str) -> float:
        if self.mode == "count":
            found = sum(1 for _ in self._compiled.finditer(text))
            return self.match * found if found else self.otherwise
        hit = self._compiled.fullmatch(text) if self.mode == "fullmatch" else self._compiled.search(text)
        return self.match if hit else self.otherwise
