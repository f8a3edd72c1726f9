"""Records of usable and skipped rows of human feedback."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from raftune.records import PromptContent

SHOWN = 5  # rows that are named for each reason; the file of skipped rows names all


class SkipReason(StrEnum):
    """Why a row is skipped."""

    BROKEN = "broken line"
    MISSING = "missing column"
    WRONG_TYPE = "wrong type"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_ANSWER = "empty answer"
    NO_SHARED_PREFIX = "no shared prefix"
    SAME = "chosen equal to rejected"
    NOT_ASSISTANT = "dialogue does not end with the assistant"
    DISORDER = "roles out of order"
    ALL_TIED = "all answers tied"
    NOT_FINITE = "non-finite rating"
    OUT_OF_RANGE = "rating out of range"
    SCORED_LOW = "scored too low"
    NOT_BEST = "not the best of its prompt"


class UnusableRow(Exception):
    """A row that cannot be used; raised inside the readers only."""

    def __init__(self, reason: SkipReason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A skipped row. `row` is its line in a file of lines, else its number; both from 1."""

    row: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two completions of a prompt; the first is the preferred one.

    An answer mirrors its prompt: a text for a text, a list of messages for messages.
    """

    row: int
    prompt: PromptContent
    chosen: Any
    rejected: Any


@dataclass(frozen=True, slots=True)
class Rating:
    """A completion and its finite rating."""

    row: int
    prompt: PromptContent
    completion: Any
    score: float


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to train on; `tools` are passed to its chat template.

    `score` is what it was given, where the data says so.
    """

    row: int
    prompt: PromptContent
    completion: Any
    tools: Any = None
    score: float | None = None


class NumberedRow(Protocol):
    """Something that was read from a numbered row."""

    @property
    def row(self) -> int: ...


T = TypeVar("T", bound=NumberedRow)


@dataclass(frozen=True, slots=True)
class Feedback(Generic[T]):
    """What one source gave: usable rows and skipped ones, both in the order of the source.

    Every row of the source is in one of the two; one that ranks K answers can be in `rows` several times.
    """

    rows: list[T]
    skipped: list[SkippedRow]
    format: str
    source: str

    def words(self) -> list[str]:
        """What was read, in a line, and a line for each reason to skip, with its first rows."""
        used = len({row.row for row in self.rows})
        several = f" from {used:,} row{'' if used == 1 else 's'}" if used != len(self.rows) else ""
        kind = (
            ("pair" if isinstance(self.rows[0], PreferencePair) else type(self.rows[0]).__name__.lower())
            if self.rows
            else "row"
        )
        counted = f"{len(self.rows):,} {kind}{'' if len(self.rows) == 1 else 's'}{several}"
        left = f"; {len(self.skipped):,} of {used + len(self.skipped):,} rows skipped" if self.skipped else ""
        return [f"{self.source}: {counted}, {self.format}{left}", *(f"  {line}" for line in reasons(self.skipped))]


def reasons(skipped: Iterable[SkippedRow]) -> list[str]:
    """A line for each reason, the most frequent first, with the first rows it befell."""
    by_reason: defaultdict[str, list[int]] = defaultdict(list)
    for one in skipped:
        by_reason[one.reason].append(one.row)
    ordered = sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"{len(rows):,} {reason}: {named(rows)}" for reason, rows in ordered]


def named(rows: list[int]) -> str:
    """The rows by number, the first few of many."""
    listed = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
    return f"row{'' if len(rows) == 1 else 's'} {listed}"


def write_skipped(skipped: Iterable[SkippedRow], path: Path) -> None:
    """Writes the skipped rows as JSON lines: row, reason, detail."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for one in skipped:
            file.write(json.dumps(asdict(one), ensure_ascii=False) + "\n")
