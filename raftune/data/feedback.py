"""Reads human feedback in the formats of known data sets: preferences, ratings, and demonstrations for SFT."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

from raftune.data.columns import (
    COMPLETION,
    COMPLETIONS,
    HH,
    IMAGE,
    SCORE,
    SCORES,
    Form,
    captioned_image,
    completion_text,
    find,
    has,
    preferred,
    prompt_and_completion,
    prompt_of,
    prompt_text,
    ranking,
    read_answer,
    read_number,
    renamed_as,
)
from raftune.data.images import is_picture
from raftune.data.rows import (
    Demonstration,
    Feedback,
    PreferencePair,
    Rating,
    SkippedRow,
    SkipReason,
    T,
    UnusableRow,
    reasons,
)
from raftune.data.tables import raw_rows
from raftune.errors import ConfigError, DataError
from raftune.records import TOOLS, Row

PREFERENCE = (
    "A preference has chosen and rejected, with a prompt of their own or as dialogues that share their first turns; "
    "or prompt, completions, and ranks or scores."
)
RATING = (
    f"A rating has prompt, completion and score; {' and '.join(COMPLETION[1:])} are read as completion, "
    f"{' and '.join(SCORE[1:])} as score."
)
BY_REWARDS = ", which a run's rewards gave and no person: what is learned from them is that reward again"
DEMONSTRATION = (
    "A demonstration is a preference (its chosen completion is learned from), or has prompt and completion, or prompt "
    "and image, or messages that end with the assistant's."
)


def collect(
    source: str,
    split: str,
    field: str,
    read: Callable[[int, Row], tuple[str, Iterable[T]]],
    wanted: str,
    columns: Mapping[str, str] | None = None,
) -> Feedback[T]:
    """All rows of the source as `read` parses them into the name of their format and records.

    `wanted` describes a usable row; `columns` maps a name to the column of the data with its values. Raises DataError
    that names `field` where no row is usable.
    """
    rows: list[T] = []
    skipped: list[SkippedRow] = []
    formats: Counter[str] = Counter()
    columns = columns or {}
    replaced = {*columns, *columns.values()}
    for number, raw in raw_rows(source, split, field):
        if isinstance(raw, SkippedRow):
            skipped.append(raw)
            continue
        try:
            if missing := [column for column in columns.values() if column not in raw]:
                raise UnusableRow(
                    SkipReason.MISSING, f"there is no column {missing[0]!r} (columns) among {', '.join(raw)}"
                )
            others = {name: cell for name, cell in raw.items() if name not in replaced}
            form, records = read(number, {name: raw[column] for name, column in columns.items()} | others)
            rows.extend(records)
            formats[form] += 1
        except UnusableRow as error:
            skipped.append(SkippedRow(number, error.reason, error.detail))
    if not rows and not skipped:
        raise DataError(f"{field} must hold at least one row; {source} is empty. {wanted}")
    if not rows:
        raise DataError(
            f"{field} must hold at least one usable row; all {len(skipped):,} of {source} were skipped: "
            f"{'; '.join(reasons(skipped))} ({skipped[0].detail}). {wanted}"
        )
    return Feedback(rows, skipped, " and ".join(form for form, _ in formats.most_common()), source)


# -- preferences -------------------------------------------------------------------------------------------------------


def read_preferences(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    dialogues: Form = "text",
    columns: Mapping[str, str] | None = None,
) -> Feedback[PreferencePair]:
    """The pairs of any preference data, and the rows that hold none. Raises DataError where no row is usable.

    `dialogues` says whether HH-RLHF's become texts or messages. K ranked completions give K(K-1)/2 pairs, less those
    of equal rank. `field` is what the source is called in an error.
    """

    def read(number: int, row: Row) -> tuple[str, list[PreferencePair]]:
        form, pairs = preferred(row)
        if form == HH and dialogues == "text":
            pairs = [(prompt_text(p), completion_text(c), completion_text(r)) for p, c, r in pairs]
        return form, [PreferencePair(number, *pair) for pair in pairs]

    return collect(source, split, field, read, PREFERENCE, columns)


# -- ratings -----------------------------------------------------------------------------------------------------------


def read_ratings(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    low: float | None = None,
    high: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> Feedback[Rating]:
    """The rated completions, and the rows that hold none. Raises DataError where no row is usable.

    Ratings below `low` or above `high` are skipped. Completion may also be called response or answer, and score rating
    or reward; `format` names the column. Rows of several completions with as many scores give a rating each.
    """
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"{field}: the lowest rating must be below the highest; got {low} and {high}. Swap them.")

    def read(number: int, row: Row) -> tuple[str, list[Rating]]:
        if has(row, COMPLETIONS) and has(row, SCORES):
            form = "ratings of several answers a row"
            prompt, completions, scores = ranking({name: value for name, value in row.items() if "rank" not in name})
        else:
            prompt_column, prompt = prompt_of(row)
            column, completion = find(row, COMPLETION)
            score_column, score = find(row, SCORE)
            completions = [read_answer(completion, prompt, column)]
            scores = [read_number(score, score_column)]
            names = ((prompt_column, "prompt"), (column, "completion"), (score_column, "score"))
            form = f"ratings ({', '.join(renamed_as(*pair) for pair in names)})"
            # `raftune samples --json` writes these columns: the scores are a run's rewards, not a person's.
            if score_column == "score" and "sample_id" in row and any(name.startswith("rewards/") for name in row):
                form += BY_REWARDS
        for score in scores:
            if (low is not None and score < low) or (high is not None and score > high):
                limits = f"from {low}" if high is None else f"up to {high}" if low is None else f"from {low} to {high}"
                raise UnusableRow(SkipReason.OUT_OF_RANGE, f"the rating {score:g} is not {limits}")
        return form, [Rating(number, prompt, *pair) for pair in zip(completions, scores, strict=True)]

    return collect(source, split, field, read, RATING, columns)


# -- demonstrations ----------------------------------------------------------------------------------------------------


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
                form, prompt, completion = captioned_image(row, column, base)
                break
        else:
            form, prompt, completion = prompt_and_completion(row, dialogues)
        score = None
        if not has(row, (*COMPLETIONS, "chosen", "rejected")) and has(row, SCORE):
            try:
                column, value = find(row, SCORE)
                score = read_number(value, column)
            except UnusableRow:
                pass  # not a number: no score
        tools = row.get(TOOLS) or None if isinstance(prompt, list) else None
        return form, [Demonstration(number, prompt, completion, tools, score)]

    return collect(source, split, field, read, DEMONSTRATION, columns)


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
                f"{field} holds completions with a score (one of the columns {', '.join(SCORE)}), from {min(scores):g} "
                f"to {max(scores):g}; learning all alike would teach the bad ones too. Choose: --min-score X learns "
                "those of X or more, --keep best the best of each prompt, --keep all every one. `reward train` learns "
                "to tell them apart."
            )
        return feedback
    if not scores and keep != "all":
        raise DataError(
            f"{field} must hold completions with a score ({', '.join(SCORE)}) for --min-score and --keep best; there "
            "is none. Leave these out, or name the column: --columns score=COLUMN."
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
            f"{field}: no completion has a score of data.min_score = {min_score} or more; the highest is "
            f"{max(scores):g}. Lower it."
        )
    return Feedback(rows, sorted(skipped, key=lambda row: row.row), feedback.format, feedback.source)
