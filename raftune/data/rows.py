"""Records of usable and skipped rows of human feedback."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

from raftune.records import PromptContent
from raftune.sanitize import counted

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
    """Two completions of a prompt, the preferred one first: texts for a text, lists of messages for messages."""

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
    """A completion to train on, with the tools of its chat template and its score where the data has them."""

    row: int
    prompt: PromptContent
    completion: Any
    tools: Any = None
    score: float | None = None


T = TypeVar("T", bound=PreferencePair | Rating | Demonstration)


@dataclass(frozen=True, slots=True)
class Feedback(Generic[T]):
    """The usable and the skipped rows of one source, both in its order.

    Every row of the source is in one of the two; one that ranks K completions can be in `rows` several times.
    """

    rows: list[T]
    skipped: list[SkippedRow]
    format: str
    source: str

    def words(self) -> list[str]:
        """A line that sums up the rows, and a line for each reason to skip, with its first rows."""
        used = len({row.row for row in self.rows})
        several = f" from {counted(used, 'row')}" if used != len(self.rows) else ""
        kind = type(self.rows[0]).__name__.lower().removeprefix("preference") if self.rows else "row"
        skipped = f"; {len(self.skipped):,} of {used + len(self.skipped):,} rows skipped" if self.skipped else ""
        first = f"{self.source}: {counted(len(self.rows), kind)}{several}, {self.format}{skipped}"
        return [first, *(f"  {line}" for line in reasons(self.skipped))]


def reasons(skipped: Iterable[SkippedRow]) -> list[str]:
    """A line for each reason, the most frequent first, with the numbers of its first rows."""
    by_reason: defaultdict[str, list[int]] = defaultdict(list)
    for row in skipped:
        by_reason[row.reason].append(row.row)
    lines = []
    for reason, rows in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        listed = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
        lines.append(f"{len(rows):,} {reason}: row{'' if len(rows) == 1 else 's'} {listed}")
    return lines


def write_skipped(skipped: Iterable[SkippedRow], path: Path) -> None:
    """Writes the skipped rows as JSON lines: row, reason, detail."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in skipped)
