"""Reads ratings: a completion with a number."""

from __future__ import annotations

from collections.abc import Mapping

from raftune.data.columns import (
    COMPLETION,
    COMPLETIONS,
    SCORE,
    SCORES,
    asked,
    find,
    has,
    read_answer,
    read_number,
    used,
)
from raftune.data.preferences import ranking
from raftune.data.rows import Feedback, Rating, SkipReason, UnusableRow
from raftune.data.source import collect
from raftune.errors import ConfigError
from raftune.records import Row

WANTED = (
    f"A rating has prompt, completion and score; {' and '.join(COMPLETION[1:])} are read as completion, "
    f"{' and '.join(SCORE[1:])} as score."
)


def read_ratings(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    low: float | None = None,
    high: float | None = None,
    columns: Mapping[str, str] | None = None,
) -> Feedback[Rating]:
    """The rated answers, and the rows that hold none. Raises DataError where no row is usable.

    Ratings below `low` or above `high` are skipped. Completion may also be called response or answer, and score rating
    or reward; `format` says what it was. Rows of several completions with as many scores give a rating each.
    """
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"{field}: the lowest rating must be below the highest; got {low} and {high}. Swap them.")

    def read(number: int, row: Row) -> tuple[str, list[Rating]]:
        form, found = rated_several(number, row) if is_several(row) else rated(number, row)
        for rating in found:
            check_range(rating.score, low, high)
        return form, found

    return collect(source, split, field, read, WANTED, columns)


OWN = ", which a run's rewards gave and no person: what is learned from them is that reward again"


def is_several(row: Row) -> bool:
    return has(row, COMPLETIONS) and has(row, SCORES)


def rated(number: int, row: Row) -> tuple[str, list[Rating]]:
    """One answer with its rating."""
    prompt_column, prompt = asked(row)
    column, answer = find(row, COMPLETION)
    score_column, score = find(row, SCORE)
    rating = Rating(number, prompt, read_answer(answer, prompt, column), read_number(score, score_column))
    columns = (used(prompt_column, "prompt"), used(column, "completion"), used(score_column, "score"))
    return f"ratings ({', '.join(columns)}){OWN if by_rewards(row, score_column) else ''}", [rating]


def by_rewards(row: Row, score_column: str) -> bool:
    """Whether the score is what a run's rewards gave, as `raftune samples --json` writes it, and no person's."""
    return score_column == "score" and "sample_id" in row and any(name.startswith("rewards/") for name in row)


def rated_several(number: int, row: Row) -> tuple[str, list[Rating]]:
    """Several answers to one prompt, each with its rating."""
    prompt, answers, scores = ranking({name: value for name, value in row.items() if "rank" not in name})
    found = [Rating(number, prompt, answer, score) for answer, score in zip(answers, scores, strict=True)]
    return "ratings of several answers a row", found


def check_range(score: float, low: float | None, high: float | None) -> None:
    """Raises Unusable for a rating beyond either end."""
    if (low is not None and score < low) or (high is not None and score > high):
        ends = f"from {low}" if high is None else f"up to {high}" if low is None else f"from {low} to {high}"
        raise UnusableRow(SkipReason.OUT_OF_RANGE, f"the rating {score:g} is not {ends}")
