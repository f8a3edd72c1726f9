"""Reward `answer`: whether a completion's final answer matches a column."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.data.classifier_inputs import text_of
from raftune.errors import RewardError
from raftune.rewards.registry import BuiltInReward, builtin

NUMBER = re.compile(r"(?<![\w.])[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])[-+−]?\.\d+")


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
        Literal["last_number", "boxed", "exact"],
        Field(
            description="The answer in the completion: last_number, last \\boxed{…}, or exact (the whole completion)."
        ),
    ] = "last_number"

    def __post_init__(self) -> None:
        self.needs = frozenset({self.column})

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        if self.column not in columns:
            have = ", ".join(sorted(columns)) or "none"
            raise RewardError(f"answer needs the column {self.column!r}; the data has: {have}. Set options.column.")
        values: list[float | None] = []
        for completion, target in zip(completions, columns[self.column], strict=True):
            expected = None if target is None else self._answer(str(target).rsplit("####", 1)[-1], target=True)
            values.append(None if expected is None else float(self._answer(text_of(completion)) == expected))
        return values

    def _answer(self, text: str, target: bool = False) -> Decimal | str | None:
        """The answer in a completion; in a target, a number or text may stand in \\boxed{…} whatever is extracted."""
        inner = boxed(text) if target or self.extract == "boxed" else text
        if target and inner is None:
            inner = text
        if inner is None:
            return None
        return last_number(inner) if self.extract == "last_number" else canonical(inner)


def last_number(text: str) -> Decimal | None:
    """The last number in the text, without thousands commas and dollar sign; None without one."""
    numbers = NUMBER.findall(text)
    return number(numbers[-1]) if numbers else None


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{…}, inner braces included; None if there is none that closes."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + len("\\boxed"), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def canonical(text: str) -> Decimal | str:
    """The number that the text is, else its words without case, dollar signs and trailing dot."""
    plain = " ".join(text.split()).removesuffix(".").strip("$ ")
    value = number(plain) if NUMBER.fullmatch(plain) else None
    return plain.casefold() if value is None else value


def number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", "").replace("−", "-"))
    except InvalidOperation:
        return None
