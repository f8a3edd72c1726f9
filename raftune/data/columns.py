"""Column names of known data sets, and checks of their contents."""

from __future__ import annotations

import math
import re
from typing import Any

from raftune.data.rows import SkipReason, UnusableRow
from raftune.data.turns import (
    SYSTEM,
    Message,
    begins,
    ends_with_assistant,
    excerpt,
    read_messages,
    says_something,
)
from raftune.records import PromptContent, Row

# The name that we use, then others under which the same is found.
PROMPT = ("prompt", "question")
COMPLETION = ("completion", "response", "answer")
COMPLETIONS = ("completions", "responses", "answers")
SCORE = ("score", "rating", "reward")
SCORES = ("scores", "ratings", "rewards")
SYSTEM_PROMPT = ("system", "system_prompt")
RANKS = ("ranks", "ranking", "rank")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_COMMA = re.compile(r"([+-]?\d+),(\d+)")


def find(row: Row, names: tuple[str, ...]) -> tuple[str, Any]:
    """The first of the names that the row has a value for, and the value. Raises Unusable where there is none."""
    for name in names:
        if row.get(name) is not None:
            return name, row[name]
    raise UnusableRow(SkipReason.MISSING, f"there is no {names[0]} among {', '.join(row) or 'no columns'}")


def has(row: Row, names: tuple[str, ...]) -> bool:
    return any(row.get(name) is not None for name in names)


def used(found: str, name: str) -> str:
    """How the format names a column that another name stands for."""
    return name if found == name else f"{found} as {name}"


def asked(row: Row) -> tuple[str, PromptContent]:
    """The name of the row's prompt column, and the prompt: behind the row's `system`, where it has one.

    To messages that is a system message, unless they begin with one; to a text, a text and a blank line before it, as
    `sampling.system_prompt` is put.
    """
    column, value = find(row, PROMPT)
    prompt = read_prompt(value, column)
    name = next((name for name in SYSTEM_PROMPT if row.get(name) is not None), None)
    system = row[name] if name is not None else ""
    if not isinstance(system, str):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{name} must be a text; got {excerpt(system)}")
    if not system.strip():
        return column, prompt
    if isinstance(prompt, list):
        given = prompt[0]["role"] in SYSTEM
        return column, prompt if given else [{"role": "system", "content": system}, *prompt]
    return f"{name}, {column}", f"{system}\n\n{prompt}"


def read_prompt(value: Any, column: str) -> PromptContent:
    """A text, or messages that end with the user's."""
    if isinstance(value, str):
        if not value.strip():
            raise UnusableRow(SkipReason.EMPTY_PROMPT, f"{column} is blank")
        return value
    if not isinstance(value, list):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be a text or a list of messages; got {excerpt(value)}")
    messages = begins(read_messages(value, column), column)
    check_prompt(messages, column)
    if messages[-1]["role"] not in ("user", "tool"):
        raise UnusableRow(SkipReason.DISORDER, f"{column} ends with the {messages[-1]['role']}'s turn")
    return messages


def check_prompt(messages: list[Message], column: str) -> None:
    """Raises Unusable unless the user says something."""
    if not any(says_something(message) for message in messages if message["role"] == "user"):
        raise UnusableRow(SkipReason.EMPTY_PROMPT, f"{column}: the user says nothing")


def read_answer(value: Any, prompt: PromptContent, column: str) -> Any:
    """The answer in the form of its prompt: a text for a text; for messages, messages that end with the assistant's."""
    if isinstance(prompt, str):
        return read_text(one_message(value, column), column)
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be a text or a list of messages; got {excerpt(value)}")
    assert isinstance(prompt, list)
    messages = read_messages(value, column)
    messages = messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages
    check_answer(messages, column)
    return messages


def one_message(value: Any, column: str) -> Any:
    """The text of a list that holds a single answer; anything else as it is."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].get("role"):
        return read_messages(value, column)[0]["content"]
    return value


def read_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be a text, like its prompt; got {excerpt(value)}")
    if not value.strip():
        raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{column} is blank")
    return value


def check_answer(messages: list[Message], column: str) -> None:
    """Raises Unusable unless the messages begin and end with the assistant, who says something."""
    ends_with_assistant(messages, column)
    if messages[0]["role"] != "assistant":
        raise UnusableRow(SkipReason.DISORDER, f"{column} begins with the {messages[0]['role']}'s turn")
    if not says_something(messages[-1]):
        raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{column} is blank")


def read_number(value: Any, column: str) -> float:
    """A finite number, also one that is written as text, as in CSV; true and false are none."""
    if isinstance(value, str):
        value = number_of(value, column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be a number; got {excerpt(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UnusableRow(SkipReason.NOT_FINITE, f"{column} is {number}")
    return number


def number_of(text: str, column: str) -> Any:
    """The number that a text says; the text where it says none. Raises Unusable where its comma can be two things."""
    plain = text.strip()
    if comma := _COMMA.fullmatch(plain):
        whole, part = comma.groups()
        if len(part) == 3 and whole.lstrip("+-0") and len(whole.lstrip("+-")) <= 3:
            raise UnusableRow(
                SkipReason.WRONG_TYPE,
                f"{column} is {plain!r}: its comma may set off decimals or thousands; write a point",
            )
        plain = f"{whole}.{part}"
    return float(plain) if _NUMBER.fullmatch(plain) else text


def read_list(value: Any, column: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{column} must be a list; got {excerpt(value)}")
    return value


def same(left: Any, right: Any) -> bool:
    """Whether two answers say the same, whatever blanks are around them."""
    if isinstance(left, str) and isinstance(right, str):
        return left.strip() == right.strip()
    return bool(trimmed(left) == trimmed(right))


def trimmed(messages: Any) -> Any:
    return [m | {"content": m["content"].strip() if isinstance(m["content"], str) else m["content"]} for m in messages]
