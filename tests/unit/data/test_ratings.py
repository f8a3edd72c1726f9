"""Claims about ratings: finite numbers within their range, under the names that data sets give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raftune.data.feedback import read_ratings
from raftune.data.rows import Feedback, Rating
from raftune.errors import ConfigError


def read(folder: Path, *rows: Any, **options: Any) -> Feedback[Rating]:
    path = folder / "ratings.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return read_ratings(str(path), **options)


def rated(score: Any) -> str:
    return f'{{"prompt": "p", "completion": "c", "score": {score}}}'


def test_a_rating_is_a_prompt_a_completion_and_a_number(tmp_path: Path) -> None:
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": "c", "score": -1}
    found = read(tmp_path, rated(2.5), chat)
    assert found.rows[0] == Rating(1, "p", "c", 2.5)
    assert found.rows[1].completion == [{"role": "assistant", "content": "c"}]


def test_other_names_of_columns_are_read_and_reported(tmp_path: Path) -> None:
    found = read(tmp_path, {"question": "p", "response": "c", "rating": 3})
    assert found.rows == [Rating(1, "p", "c", 3.0)]
    assert found.format == "ratings (question as prompt, response as completion, rating as score)"


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_a_rating_that_is_not_finite_is_skipped(tmp_path: Path, score: str) -> None:
    found = read(tmp_path, rated(1), rated(score))
    assert [(s.row, str(s.reason)) for s in found.skipped] == [(2, "non-finite rating")]


@pytest.mark.parametrize("score", ['"good"', "true", "[1]", "{}"])
def test_a_rating_that_is_no_number_is_skipped(tmp_path: Path, score: str) -> None:
    found = read(tmp_path, rated(1), rated(score))
    assert [(s.row, str(s.reason)) for s in found.skipped] == [(2, "wrong type")]


def test_a_rating_beyond_the_given_range_is_skipped_and_its_ends_are_not(tmp_path: Path) -> None:
    rows = [rated(score) for score in (0.9, 1, 3, 5, 5.1)]
    found = read(tmp_path, *rows, low=1, high=5)
    assert [row.score for row in found.rows] == [1, 3, 5]
    assert [(s.row, str(s.reason), s.detail) for s in found.skipped] == [
        (1, "rating out of range", "the rating 0.9 is not from 1 to 5"),
        (5, "rating out of range", "the rating 5.1 is not from 1 to 5"),
    ]
    assert len(read(tmp_path, *rows, low=1).rows) == 4
    assert len(read(tmp_path, *rows, high=1).rows) == 2


def test_a_range_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lowest rating must be below the highest; got 5 and 1"):
        read(tmp_path, rated(1), low=5, high=1)


def test_several_completions_with_as_many_scores_are_a_rating_each(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "p", "completions": ["a", "b"], "scores": [1, 2], "ranks": [2, 1]})
    assert found.rows == [Rating(1, "p", "a", 1.0), Rating(1, "p", "b", 2.0)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "completion": " ", "score": 1}, "empty answer"),
        ({"prompt": "", "completion": "c", "score": 1}, "empty prompt"),
        ({"prompt": "p", "score": 1}, "missing column"),
        ({"prompt": "p", "completion": "c"}, "missing column"),
    ],
)
def test_a_row_without_a_rating_is_skipped_by_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    found = read(tmp_path, rated(1), row)
    assert [str(s.reason) for s in found.skipped] == [reason]


def test_scores_of_a_run_s_rewards_are_reported_as_such_and_not_as_a_person_s(tmp_path: Path) -> None:
    """What `raftune samples --json` prints has prompt, completion and score."""
    row = {"sample_id": "0001/p-0/000", "prompt": "p", "completion": "c", "score": 1.5, "rewards/length": 1.5}
    assert "which a run's rewards gave and no person" in read(tmp_path, row).words()[0]
    assert "no person" not in read(tmp_path, {name: row[name] for name in ("prompt", "completion", "score")}).format
