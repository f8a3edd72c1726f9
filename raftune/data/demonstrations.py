"""Reads demonstrations for SFT: preferences, prompts with completions or images, and dialogues."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from raftune.data.columns import (
    COMPLETION,
    COMPLETIONS,
    SCORE,
    asked,
    check_answer,
    check_prompt,
    find,
    has,
    read_answer,
    read_list,
    read_number,
    used,
)
from raftune.data.images import is_picture
from raftune.data.preferences import HH, Form, preferred
from raftune.data.rows import Demonstration, Feedback, SkippedRow, SkipReason, UnusableRow
from raftune.data.source import collect
from raftune.data.turns import answer_text, begins, ends_with_assistant, excerpt, prompt_text, read_messages
from raftune.errors import DataError
from raftune.records import TOOLS, Row

PICTURE = ("image", "image", "completion")
CAPTION = ("prompt", "caption", "text", "label")
MESSAGES = ("messages", "conversation", "conversations")
WANTED = (
    "A demonstration is a preference (its chosen answer is learned from), or has prompt and completion, or prompt and "
    "image, or messages that end with the assistant's."
)


def read_demonstrations(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    dialogues: Form = "text",
    columns: Mapping[str, str] | None = None,
) -> Feedback[Demonstration]:
    """The answers to learn from, and the rows that hold none. Raises DataError where no row is usable.

    Of a preference the chosen answer, of ranked ones the best; the rows that are skipped are those that
    `read_preferences` skips, so that a policy and its reward model learn from the same. Of a dialogue the last turn.
    An image is the column `image`, or `completion`: bytes, or a path that begins where the source lies.
    """
    place = Path(source).expanduser()
    base = place if place.is_dir() else place.parent

    def read(number: int, row: Row) -> tuple[str, list[Demonstration]]:
        if (column := next((name for name in PICTURE if shows(row.get(name), name, base)), None)) is not None:
            form, prompt, answer = pictured(row, column, base)
        else:
            form, prompt, answer = demonstrated(row, dialogues)
        tools = row.get(TOOLS) or None
        score = None if has(row, (*COMPLETIONS, "chosen", "rejected")) else score_of(row)
        return form, [Demonstration(number, prompt, answer, tools if isinstance(prompt, list) else None, score)]

    return collect(source, split, field, read, WANTED, columns)


def score_of(row: Row) -> float | None:
    """The number that the answer was given; None where there is none."""
    try:
        return read_number(*reversed(find(row, SCORE)))
    except UnusableRow:
        return None


def choose(
    feedback: Feedback[Demonstration], min_score: float | None, keep: Literal["best", "all"] | None, field: str
) -> Feedback[Demonstration]:
    """The answers that are good enough to learn; the others are skipped, and named.

    Raises DataError where answers are scored, not all alike, and nobody said which to learn; and where scores are asked
    for that there are not.
    """
    scores = [row.score for row in feedback.rows if row.score is not None]
    if min_score is None and keep is None:
        if len({*scores}) > 1:
            raise DataError(
                f"{field} holds answers with a score (one of the columns {', '.join(SCORE)}), from {min(scores):g} to "
                f"{max(scores):g}; learning all alike would teach the bad ones too. Choose: --min-score X learns those "
                "of X or more, --keep best the best of each prompt, --keep all every one. `reward train` learns to "
                "tell them apart."
            )
        return feedback
    if not scores and keep != "all":
        raise DataError(
            f"{field} must hold answers with a score ({', '.join(SCORE)}) for --min-score and --keep best; there is "
            "none. Leave these out, or name the column: --columns score=COLUMN."
        )
    best: dict[str, tuple[float, int]] = {}
    for number, row in enumerate(feedback.rows):
        if row.score is not None:
            key = json.dumps([row.prompt, row.tools], sort_keys=True, default=repr)
            best[key] = max(best.get(key, (-math.inf, 0)), (row.score, -number))
    chosen = {-number for _, number in best.values()}
    rows, skipped = [], list(feedback.skipped)
    for number, row in enumerate(feedback.rows):
        if min_score is not None and (row.score is None or row.score < min_score):
            given = "no score" if row.score is None else f"the score {row.score:g}"
            skipped.append(SkippedRow(row.row, SkipReason.SCORED_LOW, f"{given}; data.min_score is {min_score:g}"))
        elif keep == "best" and number not in chosen:
            skipped.append(SkippedRow(row.row, SkipReason.NOT_BEST, f"the score {row.score}"))
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"{field}: no answer has a score of data.min_score = {min_score} or more; the highest is {max(scores):g}. "
            "Lower it."
        )
    return Feedback(rows, sorted(skipped, key=lambda one: one.row), feedback.format, feedback.source)


def shows(value: Any, column: str, base: Path) -> bool:
    """Whether this is an image, or the path of one; a completion may also be a text that only looks like a path."""
    if not is_picture(value):
        return False
    return not (column == "completion" and isinstance(value, str)) or (base / value).is_file()


def pictured(row: Row, column: str, base: Path) -> tuple[str, Any, Any]:
    """The format, the prompt (a text or a class label), and the image, a path named in full."""
    prompt_column, prompt = find(row, CAPTION)
    if isinstance(prompt, bool) or not isinstance(prompt, str | int):
        raise UnusableRow(
            SkipReason.WRONG_TYPE, f"{prompt_column} must be a text or a class label; got {excerpt(prompt)}"
        )
    value = row[column]
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if isinstance(value, str) and not (path := base / Path(value).expanduser()).is_file():
        raise UnusableRow(SkipReason.MISSING, f"{column}: there is no file {path}")
    form = f"prompts and images ({used(prompt_column, 'prompt')}, {used(column, 'image')})"
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
