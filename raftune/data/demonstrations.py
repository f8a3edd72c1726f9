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
    check_answer,
    check_assistant_ends,
    check_prompt,
    check_user_begins,
    completion_text,
    find,
    has,
    prompt_of,
    prompt_text,
    read_answer,
    read_list,
    read_messages,
    read_number,
    renamed_as,
    wrong_type,
)
from raftune.data.images import is_picture
from raftune.data.preferences import HH, Form, preferred
from raftune.data.rows import Demonstration, Feedback, SkippedRow, SkipReason, UnusableRow
from raftune.data.source import collect
from raftune.errors import DataError
from raftune.records import TOOLS, Row

IMAGE = ("image", "completion")
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
    """The completions to learn from, and the rows that hold none. Raises DataError where no row is usable.

    Of a preference the chosen completion, of ranked ones the best, of a dialogue the last turn. The rows of preferences
    that are skipped are those that `read_preferences` skips. An image is the column `image` or `completion`: bytes, or
    a path relative to the source.
    """
    path = Path(source).expanduser()
    base = path if path.is_dir() else path.parent

    def read(number: int, row: Row) -> tuple[str, list[Demonstration]]:
        for column in IMAGE:
            value = row.get(column)
            if not is_picture(value):
                continue
            # a completion may be a text that only looks like a path
            if column == "image" or not isinstance(value, str) or (base / value).is_file():
                form, prompt, completion = _captioned_image(row, column, base)
                break
        else:
            form, prompt, completion = _prompt_and_completion(row, dialogues)
        score = None
        if not has(row, (*COMPLETIONS, "chosen", "rejected")) and has(row, SCORE):
            try:
                column, value = find(row, SCORE)
                score = read_number(value, column)
            except UnusableRow:
                pass  # not a number: no score
        tools = row.get(TOOLS) or None if isinstance(prompt, list) else None
        return form, [Demonstration(number, prompt, completion, tools, score)]

    return collect(source, split, field, read, WANTED, columns)


def choose(
    feedback: Feedback[Demonstration], min_score: float | None, keep: Literal["best", "all"] | None, field: str
) -> Feedback[Demonstration]:
    """The completions that are good enough to learn; the others are skipped with the reason.

    Raises DataError where completions have different scores and neither option says which to learn, and where scores
    are required but missing.
    """
    scores = [row.score for row in feedback.rows if row.score is not None]
    if min_score is None and keep is None:
        if len(set(scores)) > 1:
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
    best: dict[str, tuple[float, int]] = {}  # of each prompt, the highest score and its first row
    for number, row in enumerate(feedback.rows):
        if row.score is not None:
            key = json.dumps([row.prompt, row.tools], sort_keys=True, default=repr)
            best[key] = max(best.get(key, (-math.inf, 0)), (row.score, -number))
    best_rows = {-number for _, number in best.values()}
    rows, skipped = [], list(feedback.skipped)
    for number, row in enumerate(feedback.rows):
        if min_score is not None and (row.score is None or row.score < min_score):
            score = "no score" if row.score is None else f"the score {row.score:g}"
            skipped.append(SkippedRow(row.row, SkipReason.SCORED_LOW, f"{score}; data.min_score is {min_score:g}"))
        elif keep == "best" and number not in best_rows:
            skipped.append(SkippedRow(row.row, SkipReason.NOT_BEST, f"the score {row.score}"))
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"{field}: no answer has a score of data.min_score = {min_score} or more; the highest is {max(scores):g}. "
            "Lower it."
        )
    return Feedback(rows, sorted(skipped, key=lambda row: row.row), feedback.format, feedback.source)


def _captioned_image(row: Row, column: str, base: Path) -> tuple[str, Any, Any]:
    """The format, the prompt (a text or a class label), and the image: bytes or a full path."""
    prompt_column, prompt = find(row, CAPTION)
    if isinstance(prompt, bool) or not isinstance(prompt, str | int):
        raise wrong_type(prompt_column, "a text or a class label", prompt)
    value = row[column]
    if isinstance(value, dict):
        value = value["bytes"] or value["path"]
    if isinstance(value, str):
        path = base / Path(value).expanduser()
        if not path.is_file():
            raise UnusableRow(SkipReason.MISSING, f"{column}: there is no file {path}")
        value = str(path)
    return f"prompts and images ({renamed_as(prompt_column, 'prompt')}, {renamed_as(column, 'image')})", prompt, value


def _prompt_and_completion(row: Row, dialogues: Form) -> tuple[str, Any, Any]:
    """The format, the prompt, and the completion to learn: of messages the last turn."""
    form_of_pair = ""
    if has(row, ("chosen", "rejected")) or has(row, COMPLETIONS):
        form_of_pair, pairs = preferred(row)
        form = f"preferred answers of {form_of_pair}"
        prompt, completion, _ = pairs[0]
    elif has(row, MESSAGES) and not has(row, COMPLETION):
        column, value = find(row, MESSAGES)
        messages = read_messages(read_list(value, column), column)
        check_user_begins(messages, column)
        check_assistant_ends(messages, column)
        check_prompt(messages[:-1], column)
        check_answer(messages[-1:], column)
        form, prompt, completion = renamed_as(column, "messages"), messages[:-1], messages[-1:]
    else:
        prompt_column, prompt = prompt_of(row)
        column, value = find(row, COMPLETION)
        form = f"prompts and completions ({renamed_as(prompt_column, 'prompt')}, {renamed_as(column, 'completion')})"
        completion = read_answer(value, prompt, column)
    if isinstance(prompt, list):
        messages = prompt + completion
        prompt, completion = messages[:-1], messages[-1:]
        if form_of_pair == HH and dialogues == "text":
            prompt, completion = prompt_text(prompt), completion_text(completion)
    return form, prompt, completion
