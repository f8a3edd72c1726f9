"""Reward `answer`: whether a completion's final answer matches a column."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.errors import RewardError
from raftune.rewards.builtin.text import text_of
from raftune.rewards.fingerprint import digest
from raftune.rewards.registry import BuiltInReward, builtin

NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-+−]?\.\d+")
Extract = Literal["last_number", "boxed", "exact"]


@builtin("answer", media=("text", "messages"), example={"column": "answer", "extract": "last_number"})
@dataclass
class AnswerReward(BuiltInReward):
    """1.0 if the answer in the completion equals the column's, else 0.0; None if the column has none.

    Numbers are compared as numbers: 1,000, $1000 and 1000.0 are equal;
    other answers as text without case, outer spaces, dollar signs and a trailing dot. In a GSM8K column (a solution
    that ends in `#### 42`) the answer follows the last ####. A column without an answer of this kind (without a number)
    gives None.
    """

    column: Annotated[str, Field(description="Column with the correct answer.")] = "answer"
    extract: Annotated[
        Extract,
        Field(
            description="The answer in the completion: last_number, last \\boxed{…}, or exact (the whole completion)."
        ),
    ] = "last_number"

    def __post_init__(self) -> None:
        self.fingerprint = digest("answer", 1, self.column, self.extract)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if self.column not in columns:
            have = ", ".join(sorted(columns)) or "none"
            raise RewardError(f"answer needs the column {self.column!r}; the data has: {have}. Set options.column.")
        pairs = zip(completions, columns[self.column], strict=True)
        return [self._value(text_of(completion), wanted) for completion, wanted in pairs]

    def _value(self, text: str, wanted: Any) -> float | None:
        target = self._target(wanted)
        if target is None:
            return None
        return 1.0 if self._found(text) == target else 0.0

    def _target(self, wanted: Any) -> Decimal | str | None:
        if wanted is None:
            return None
        text = str(wanted).rsplit("####", 1)[-1]
        inner = boxed(text)
        if self.extract == "last_number":
            return last_number(text if inner is None else inner)
        return canonical(text if inner is None else inner)

    def _found(self, text: str) -> Decimal | str | None:
        if self.extract == "last_number":
            return last_number(text)
        inner = boxed(text) if self.extract == "boxed" else text
        return None if inner is None else canonical(inner)


def last_number(text: str) -> Decimal | None:
    """The last number in the text, without thousands commas and dollar sign; None without one."""
    found = NUMBER.findall(text)
    return number(found[-1]) if found else None


def boxed(text: str) -> str | None:
    """What stands in the braces of the last \\boxed{…}, inner braces included; None where there is none that closes."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def canonical(text: str) -> Decimal | str:
    """The number that the text is, else its words without case, dollar signs and trailing dot."""
    plain = " ".join(text.split()).removesuffix(".").strip("$ ")
    match = NUMBER.fullmatch(plain)
    value = number(plain) if match else None
    return plain.casefold() if value is None else value


def number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:
        return None
