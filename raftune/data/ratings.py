"""Reads ratings: a completion with a number."""

from __future__ import annotations

from collections.abc import Mapping

from raftune.data.columns import (
    COMPLETION,
    COMPLETIONS,
    SCORE,
    SCORES,
    find,
    has,
    prompt_of,
    read_answer,
    read_number,
    renamed_as,
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
BY_REWARDS = ", which a run's rewards gave and no person: what is learned from them is that reward again"


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

    return collect(source, split, field, read, WANTED, columns)
