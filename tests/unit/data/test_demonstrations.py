"""Claims about what is learned from: preferred answers, completions, last turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raftune.data.feedback import read_demonstrations, read_preferences
from raftune.data.rows import Demonstration, Feedback
from tests.hh import write_hh

H, A = "\n\nHuman: ", "\n\nAssistant: "


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def read(folder: Path, *rows: Any, **options: Any) -> Feedback[Demonstration]:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_demonstrations(str(path), **options)


def test_of_a_preference_the_chosen_completion_is_learned_and_of_ranked_ones_the_best(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [3, 1, 2]},
        {"prompt": "p", "completion": "c"},
    ]
    assert read(tmp_path, *rows).rows == [
        Demonstration(1, "p", "a"),
        Demonstration(2, "p", "b"),
        Demonstration(3, "p", "c"),
    ]


def test_a_policy_learns_from_the_rows_that_its_reward_model_does(tmp_path: Path) -> None:
    written = write_hh(tmp_path / "hh.jsonl")
    pairs, learned = read_preferences(str(written.path)), read_demonstrations(str(written.path))
    assert learned.skipped == pairs.skipped
    assert [one.row for one in learned.rows] == [one.row for one in pairs.rows]


@pytest.mark.parametrize("dialogues", ["text", "messages"])
def test_of_a_completion_over_several_turns_the_last_is_learned(tmp_path: Path, dialogues: Any) -> None:
    row = {"chosen": f"{H}Hi{A}Hello{H}Why?{A}Because", "rejected": f"{H}Hi{A}No"}
    [one] = read(tmp_path, row, dialogues=dialogues).rows
    if dialogues == "text":
        assert (one.prompt, one.completion) == (f"{H}Hi{A}Hello{H}Why?\n\nAssistant:", " Because")
    else:
        assert isinstance(one.prompt, list) and len(one.prompt) == 3
        assert one.completion == [message("assistant", "Because")]


def test_the_last_turn_of_a_dialogue_is_learned_after_all_others(tmp_path: Path) -> None:
    turns = [message("system", "s"), message("user", "u"), message("assistant", "a"), message("user", "v")]
    found = read(tmp_path, {"messages": [*turns, message("assistant", "b")]})
    assert found.rows == [Demonstration(1, turns, [message("assistant", "b")])]
    assert found.format == "messages"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [message("user", "u")]}, "dialogue does not end with the assistant"),
        ({"messages": [message("assistant", "a")]}, "roles out of order"),
        ({"messages": [message("system", "s"), message("assistant", "a")]}, "roles out of order"),
        ({"messages": [message("user", " "), message("assistant", "a")]}, "empty prompt"),
        ({"messages": [message("user", "u"), message("assistant", " ")]}, "empty answer"),
        ({"messages": []}, "dialogue does not end with the assistant"),
        ({"messages": "u"}, "wrong type"),
        ({"prompt": "p", "completion": ""}, "empty answer"),
        ({"prompt": "p"}, "missing column"),
        ({"text": "p"}, "missing column"),
        ({"prompt": "p", "chosen": "a"}, "missing column"),
    ],
)
def test_a_row_without_a_completion_to_learn_is_skipped_by_its_reason(tmp_path: Path, row: Any, reason: str) -> None:
    found = read(tmp_path, {"prompt": "p", "completion": "c"}, row)
    assert [(one.row, str(one.reason)) for one in found.skipped] == [(2, reason)]
