"""A number for completions that match a regular expression, another for those that do not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from raftune.errors import ConfigError
from raftune.rewards.fingerprint import digest
from raftune.rewards.text import TEXT_MEDIA, text_of


@dataclass
class Regex:
    """`match` where the pattern is found, else `otherwise`; with mode `count`, `match` times the number of matches.

    mode: `search` (anywhere), `fullmatch` (the whole completion), `count` (matches that do not overlap). Flags go into
    the pattern: `(?i)` for either case, `(?s)` where a dot may match a line break.
    """

    pattern: str
    match: float = 1.0
    otherwise: float = 0.0
    mode: Literal["search", "fullmatch", "count"] = "search"
    name: str = "regex"
    media: frozenset[str] = field(default=TEXT_MEDIA, init=False)
    fingerprint: str = field(default="", init=False)

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
