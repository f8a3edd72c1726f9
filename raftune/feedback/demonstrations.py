"""Demonstrations: answers to learn from as they stand, from preferences, prompts with completions or pictures, or
dialogues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raftune.feedback.columns import (
    COMPLETION,
    COMPLETIONS,
    Row,
    asked,
    check_answer,
    check_prompt,
    find,
    has,
    read_answer,
    read_list,
    used,
)
from raftune.feedback.preferences import HH, Form, preferred
from raftune.feedback.rows import Demonstration, Feedback, Reason, Unusable
from raftune.feedback.source import collect
from raftune.feedback.turns import answer_text, begins, ends_with_assistant, excerpt, prompt_text, read_messages
from raftune.pictures import is_picture
from raftune.records import TOOLS

PICTURE = ("image", "picture", "completion")
CAPTION = ("prompt", "caption", "text", "label")
MESSAGES = ("messages", "conversation", "conversations")
WANTED = (
    "A demonstration is a preference (its chosen answer is learned from), or has prompt and completion, or prompt and "
    "image, or messages that end with the assistant's."
)


def read_demonstrations(
    source: str, split: str = "train", *, field: str = "data", dialogues: Form = "text"
) -> Feedback[Demonstration]:
    """The answers to learn from, and the rows that hold none. Raises DataError where no row is usable.

    Of a preference the chosen answer, of ranked ones the best; the rows that are skipped are those that
    `read_preferences` skips, so that a policy and its reward model learn from the same. Of a dialogue the last turn.
    A picture is the column `image`, or `completion`: bytes, or a path that begins where the source lies.
    """
    place = Path(source).expanduser()
    base = place if place.is_dir() else place.parent

    def read(number: int, row: Row) -> tuple[str, list[Demonstration]]:
        if (column := next((name for name in PICTURE if shows(row.get(name), name, base)), None)) is not None:
            form, prompt, answer = pictured(row, column, base)
        else:
            form, prompt, answer = demonstrated(row, dialogues)
        tools = row.get(TOOLS) or None
        return form, [Demonstration(number, prompt, answer, tools if isinstance(prompt, list) else None)]

    return collect(source, split, field, read, WANTED)


def shows(value: Any, column: str, base: Path) -> bool:
    """Whether this is a picture, or the path of one; a completion may also be a text that only looks like a path."""
    if not is_picture(value):
        return False
    return not (column == "completion" and isinstance(value, str)) or (base / value).is_file()


def pictured(row: Row, column: str, base: Path) -> tuple[str, Any, Any]:
    """The format, the prompt (a text or a class label), and the picture, a path named in full."""
    prompt_column, prompt = find(row, CAPTION)
    if isinstance(prompt, bool) or not isinstance(prompt, str | int):
        raise Unusable(Reason.WRONG_TYPE, f"{prompt_column} must be a text or a class label; got {excerpt(prompt)}")
    value = row[column]
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if isinstance(value, str) and not (path := base / Path(value).expanduser()).is_file():
        raise Unusable(Reason.MISSING, f"{column}: there is no file {path}")
    form = f"prompts and pictures ({used(prompt_column, 'prompt')}, {used(column, 'image')})"
    return form, prompt, str(path) if isinstance(value, str) else value


def demonstrated(row: Row, dialogues: Form) -> tuple[str, Any, Any]:
    """The format, the prompt, and the answer to learn."""
    if has(row, ("chosen", "rejected")) or has(row, COMPLETIONS):
        return best_of(row, dialogues)
    if has(row, MESSAGES) and not has(row, COMPLETION):
        column, value = find(row, MESSAGES)
        return used(column, "messages"), *last_turn(read_list(value, column), column)
    prompt_column, prompt = asked(row)
    column, answer = find(row, COMPLETION)
    form = f"prompts and completions ({used(prompt_column, 'prompt')}, {used(column, 'completion')})"
    answer = read_answer(answer, prompt, column)
    return form, *(parted(prompt + answer) if isinstance(prompt, list) else (prompt, answer))


def best_of(row: Row, dialogues: Form) -> tuple[str, Any, Any]:
    """The preferred answer; where it goes on for several turns, the last of them."""
    best = next(preferred(row))
    form = f"preferred answers of {best.format}"
    if not isinstance(best.prompt, list):
        return form, best.prompt, best.chosen
    prompt, answer = parted(best.prompt + best.chosen)
    if best.format == HH and dialogues == "text":
        return form, prompt_text(prompt), answer_text(answer)
    return form, prompt, answer


def last_turn(value: list[Any], column: str) -> tuple[list[Any], list[Any]]:
    """The dialogue without its last turn, and that turn."""
    messages = ends_with_assistant(begins(read_messages(value, column), column), column)
    prompt, answer = parted(messages)
    check_prompt(prompt, column)
    check_answer(answer, column)
    return prompt, answer


def parted(messages: list[Any]) -> tuple[list[Any], list[Any]]:
    return messages[:-1], messages[-1:]
