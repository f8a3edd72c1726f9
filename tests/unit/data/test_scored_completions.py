"""Answers with a score are learned by choice, never all alike in silence; columns may have other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raftune.cli.commands.sft import in_full
from raftune.config.load import validate_as
from raftune.config.run import DataConfig
from raftune.config.sft import DemonstrationsConfig
from raftune.data.feedback import choose, read_demonstrations, read_preferences, read_ratings
from raftune.errors import DataError
from raftune.stages.data import DataStage
from tests.runs import tiny

ROWS = [
    {"prompt": "p", "completion": "bad", "rating": 1},
    {"prompt": "p", "completion": "good", "rating": 5},
    {"prompt": "p", "completion": "as good", "rating": 5},
    {"prompt": "q", "completion": "fair", "rating": "3"},
    {"prompt": "q", "completion": "unrated"},
]


def saved(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def learned(
    folder: Path, rows: list[dict[str, Any]], min_score: float | None, keep: Any
) -> tuple[list[str], list[Any]]:
    found = choose(read_demonstrations(saved(folder, rows)), min_score, keep, "data.path")
    return [row.completion for row in found.rows], [(one.row, str(one.reason)) for one in found.skipped]


def test_scored_completions_are_refused_until_somebody_says_which_to_learn(tmp_path: Path) -> None:
    message = r"data\.path holds completions with a score .* from 1 to 5.*--min-score X.*--keep"
    with pytest.raises(DataError, match=message):
        learned(tmp_path, ROWS, None, None)


@pytest.mark.parametrize(
    ("min_score", "keep", "expected"),
    [
        (None, "all", ["bad", "good", "as good", "fair", "unrated"]),
        (None, "best", ["good", "fair"]),
        (3.0, None, ["good", "as good", "fair"]),
        (4.0, "best", ["good"]),
    ],
)
def test_what_is_chosen_is_learned_and_the_rest_is_named(
    tmp_path: Path, min_score: float | None, keep: Any, expected: list[str]
) -> None:
    completions, skipped = learned(tmp_path, ROWS, min_score, keep)
    assert completions == expected
    assert len(completions) + len(skipped) == len(ROWS)
    assert {reason for _, reason in skipped} <= {"scored too low", "not the best of its prompt"}


def test_scores_that_say_nothing_need_no_choice_and_scores_that_are_not_there_cannot_be_chosen_by(
    tmp_path: Path,
) -> None:
    alike = [{"prompt": "p", "completion": word, "score": 1} for word in "ab"]
    assert learned(tmp_path, alike, None, None) == (["a", "b"], [])
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b", "score": number} for number in (1, 2)]
    assert learned(tmp_path, pairs, None, None) == (["a", "a"], [])
    with pytest.raises(DataError, match="must hold completions with a score"):
        learned(tmp_path, [{"prompt": "p", "completion": "a"}], 3.0, None)
    with pytest.raises(DataError, match=r"no completion has a score of data.min_score = 9.* the highest is 5"):
        learned(tmp_path, ROWS, 9.0, None)


def test_columns_of_other_names_are_read_under_those_that_are_given(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"ask": "p", "reply": "a", "stars": 4, "worse": "b"}, {"ask": "q"}])
    columns = {"prompt": "ask", "completion": "reply", "score": "stars"}
    [rated] = read_ratings(path, columns=columns).rows
    assert (rated.prompt, rated.completion, rated.score) == ("p", "a", 4.0)
    found = read_demonstrations(path, columns=columns)
    assert [(row.completion, row.score) for row in found.rows] == [("a", 4.0)]
    assert [(one.row, str(one.reason)) for one in found.skipped] == [(2, "missing column")]
    [pair] = read_preferences(path, columns={"prompt": "ask", "chosen": "reply", "rejected": "worse"}).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "a", "b")


def test_columns_are_written_as_pairs_or_as_a_mapping() -> None:
    for given in ("prompt=question, score=stars", {"prompt": "question", "score": "stars"}):
        section = validate_as(DemonstrationsConfig, {"path": "x", "columns": given})
        assert section.columns == {"prompt": "question", "score": "stars"}
    assert "columns" not in DataConfig().model_dump()  # so that what was made before is still the same
    assert in_full("--min-score=4") == "--data.min_score=4" and in_full("--keep") == "--data.keep"
    assert in_full("--columns") == "--data.columns" and in_full("--data.limit") == "--data.limit"


def test_a_run_reads_its_prompts_under_the_names_that_are_given(tmp_path: Path) -> None:
    path = saved(tmp_path, [{"ask": number, "gold": "x", "human": "old"} for number in (0, 1)])
    data = {"prompts": path, "columns": {"prompt": "ask", "human": "gold"}}
    table = DataStage(tiny.config(tmp_path / "run", data=data)).train()
    assert table is not None and table.column_names == ["prompt_id", "prompt", "human"]
    assert table.column("prompt").to_pylist() == [0, 1] and table.column("human").to_pylist() == ["x", "x"]
    with pytest.raises(DataError, match=r"data\.columns must name columns of the data; got 'nope' for 'prompt'"):
        DataStage(tiny.config(tmp_path / "run", data={"prompts": path, "columns": {"prompt": "nope"}})).train()
