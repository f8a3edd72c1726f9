"""Reward `regex`: one number for a match, another for none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.data.classifier_inputs import text_of
from raftune.errors import ConfigError
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

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        texts = [text_of(completion) for completion in completions]
        if self.mode == "count":
            counts = [sum(1 for _ in self._compiled.finditer(text)) for text in texts]
            return [self.match * count if count else self.otherwise for count in counts]
        match = self._compiled.fullmatch if self.mode == "fullmatch" else self._compiled.search
        return [self.match if match(text) else self.otherwise for text in texts]
