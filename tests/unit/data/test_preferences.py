"""Claims about pairs: where prompts end, which formats are known, and what becomes of each row that holds no pair."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from raftune.data.feedback import read_preferences
from raftune.data.rows import Feedback, PreferencePair
from raftune.errors import DataError
from tests.hh import write_hh

H, A = "\n\nHuman: ", "\n\nAssistant: "
USER = {"role": "user", "content": "Why?"}


def assistant_message(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "prefs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def read(folder: Path, *rows: Any, **options: Any) -> Feedback[PreferencePair]:
    return read_preferences(write(folder, *rows), **options)


def reason(folder: Path, row: Any) -> tuple[str, str]:
    """Why the row is skipped: it stands beside one that can be used."""
    found = read(folder, {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    assert [pair.row for pair in found.rows] == [1]
    [one] = found.skipped
    assert one.row == 2
    return str(one.reason), one.detail


def test_every_line_of_an_awkward_file_meets_its_known_fate(tmp_path: Path) -> None:
    for name in ("hh.jsonl", "hh.jsonl.gz"):
        written = write_hh(tmp_path / name)
        found = read_preferences(str(written.path))
        assert written.rows >= 1000
        assert (len(found.rows), len(found.rows) + len(found.skipped)) == (written.usable, written.rows)
        reasons = sorted({one.reason for one in found.skipped})
        by_reason = {str(r): tuple(s.row for s in found.skipped if s.reason == r) for r in reasons}
        assert by_reason == written.skipped
        assert all(one.detail for one in found.skipped)


def test_a_shared_beginning_of_the_completions_is_theirs_and_not_the_prompts(tmp_path: Path) -> None:
    [pair] = read(tmp_path, {"chosen": f"{H}Why?{A}Because of x", "rejected": f"{H}Why?{A}Because of y"}).rows
    assert (pair.prompt, pair.chosen, pair.rejected) == (f"{H}Why?\n\nAssistant:", " Because of x", " Because of y")


def test_prompt_and_completion_as_texts_join_to_the_dialogue_that_was_given(tmp_path: Path) -> None:
    whole = f"{H}Why?{A}Why not?{H}Tell me.{A}Because: Human: is a word here"
    [pair] = read(tmp_path, {"chosen": whole, "rejected": f"{H}Why?{A}Why not?{H}Tell me.{A}No"}).rows
    assert isinstance(pair.prompt, str)
    assert pair.prompt + pair.chosen == whole


def test_a_dialogue_becomes_messages_where_they_are_asked_for(tmp_path: Path) -> None:
    row = {"chosen": f"{H}Hi{A}Hello{H}Why?{A}Because", "rejected": f"{H}Hi{A}Hello{H}Why?{A}No"}
    [pair] = read(tmp_path, row, dialogues="messages").rows
    assert pair.prompt == [{"role": "user", "content": "Hi"}, assistant_message("Hello"), USER]
    assert (pair.chosen, pair.rejected) == ([assistant_message("Because")], [assistant_message("No")])


def test_dialogues_that_part_early_share_what_comes_before_and_go_on_for_several_turns(tmp_path: Path) -> None:
    row = {"chosen": f"{H}Hi{A}Hello{H}Why?{A}Because", "rejected": f"{H}Hi{A}No"}
    [pair] = read(tmp_path, row).rows
    assert (pair.prompt, pair.rejected) == (f"{H}Hi\n\nAssistant:", " No")
    assert pair.chosen == f" Hello{H}Why?{A}Because"


def test_a_prompt_ends_with_the_users_turn_also_where_the_next_questions_differ(tmp_path: Path) -> None:
    row = {"chosen": f"{H}Hi{A}Hello{H}Why?{A}Because", "rejected": f"{H}Hi{A}Hello{H}How?{A}Thus"}
    [pair] = read(tmp_path, row).rows
    assert pair.prompt == f"{H}Hi\n\nAssistant:"


def test_the_formats_of_trl_give_the_same_pair(tmp_path: Path) -> None:
    dialogue = {"chosen": [USER, assistant_message("x")], "rejected": [USER, assistant_message("y")]}
    apart = {"prompt": [USER], "chosen": [assistant_message("x")], "rejected": [assistant_message("y")]}
    repeated = {"prompt": "Why?", **dialogue}  # the prompt as a text beside dialogues that hold it
    mixed = {"prompt": [USER], "chosen": "x", "rejected": "y"}
    found = read(tmp_path, dialogue, apart, repeated, mixed)
    assert not found.skipped
    assert {json.dumps([p.prompt, p.chosen, p.rejected]) for p in found.rows} == {
        json.dumps([[USER], [assistant_message("x")], [assistant_message("y")]])
    }


def test_an_explicit_text_pair_is_read_unchanged(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": " Why?\n", "chosen": " x\n", "rejected": " y"})
    assert found.rows == [PreferencePair(1, " Why?\n", " x\n", " y")]
    assert found.format == "explicit preferences"


@pytest.mark.parametrize("seed", range(20))
def test_k_ranked_completions_give_every_pair_but_those_that_are_tied(tmp_path: Path, seed: int) -> None:
    rng = Random(seed)
    k = rng.randint(2, 7)
    answers, ranks = [f"answer {i}" for i in range(k)], [rng.randint(1, 4) for _ in range(k)]
    expected = {(i, j) for a, b in combinations(range(k), 2) for i, j in [(a, b), (b, a)] if ranks[i] < ranks[j]}
    rows = [
        {"prompt": "p", "completions": answers, "ranks": ranks},
        {"prompt": "p", "responses": answers, "scores": [-r for r in ranks]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    found = read(tmp_path, *rows)
    for number in (1, 2):
        pairs = [(answers.index(p.chosen), answers.index(p.rejected)) for p in found.rows if p.row == number]
        assert len(pairs) == len(set(pairs)) and set(pairs) == expected
    if len(set(ranks)) == 1:
        assert {(s.row, str(s.reason)) for s in found.skipped} == {(1, "all answers tied"), (2, "all answers tied")}
    if len(set(ranks)) == k:
        assert len(found.rows) == k * (k - 1) + 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "broken line"),
        ("[1]", "wrong type"),
        ('{"chosen": "\\ud800", "rejected": "x", "prompt": "p"}', "broken line"),
        ({"chosen": "x"}, "missing column"),
        ({"prompt": "p", "chosen": None, "rejected": "x"}, "missing column"),
        ({"prompt": "p", "chosen": 3, "rejected": "x"}, "wrong type"),
        ({"prompt": 3, "chosen": "x", "rejected": "y"}, "wrong type"),
        ({"prompt": {"text": "p"}, "chosen": "x", "rejected": "y"}, "wrong type"),
        ({"prompt": "p", "chosen": ["x"], "rejected": "y"}, "wrong type"),
        ({"chosen": "x", "rejected": [USER, assistant_message("y")]}, "wrong type"),
        ({"prompt": " \n", "chosen": "x", "rejected": "y"}, "empty prompt"),
        ({"prompt": [{"role": "user", "content": ""}], "chosen": "x", "rejected": "y"}, "empty prompt"),
        ({"prompt": [], "chosen": "x", "rejected": "y"}, "empty prompt"),
        ({"prompt": "p", "chosen": "", "rejected": "y"}, "empty answer"),
        ({"prompt": [USER], "chosen": [assistant_message(" ")], "rejected": [assistant_message("y")]}, "empty answer"),
        ({"prompt": "p", "chosen": "x", "rejected": " x\n"}, "chosen equal to rejected"),
        (
            {"chosen": [USER, assistant_message("x")], "rejected": [USER, assistant_message("x ")]},
            "chosen equal to rejected",
        ),
        ({"chosen": "x and y", "rejected": "x and z"}, "no shared prefix"),
        ({"chosen": f"{H}Why?{A}x", "rejected": f"{H}How?{A}y"}, "no shared prefix"),
        ({"chosen": f"{H}Why?{A}x", "rejected": f"{H}Why?"}, "dialogue does not end with the assistant"),
        ({"chosen": [USER], "rejected": [USER, assistant_message("y")]}, "dialogue does not end with the assistant"),
        (
            {"prompt": [USER], "chosen": [], "rejected": [assistant_message("y")]},
            "dialogue does not end with the assistant",
        ),
        ({"chosen": f"{A}x{A}z", "rejected": f"{A}x{A}y"}, "roles out of order"),
        ({"chosen": f"Note.{H}Why?{A}z", "rejected": f"Note.{H}Why?{A}y"}, "roles out of order"),
        ({"prompt": [assistant_message("x")], "chosen": "x", "rejected": "y"}, "roles out of order"),
        ({"prompt": [USER, assistant_message("x")], "chosen": "x", "rejected": "y"}, "roles out of order"),
        ({"prompt": [{"role": "wizard", "content": "?"}], "chosen": "x", "rejected": "y"}, "roles out of order"),
        ({"prompt": [USER, USER], "chosen": "x", "rejected": "y"}, "roles out of order"),
        ({"prompt": ["Why?"], "chosen": "x", "rejected": "y"}, "wrong type"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "wrong type"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1, "last"]}, "wrong type"),
        ({"prompt": "p", "completions": "ab", "ranks": [1, 2]}, "wrong type"),
        ('{"prompt": "p", "completions": ["a", "b"], "scores": [1, NaN]}', "non-finite rating"),
        ({"prompt": "p", "completions": ["a", ""], "scores": [1, 2]}, "empty answer"),
        ({"prompt": "p", "completions": ["a", "a"], "scores": [1, 2]}, "chosen equal to rejected"),
    ],
)
def test_a_row_without_a_pair_is_skipped_by_its_reason(tmp_path: Path, row: Any, expected: str) -> None:
    found, detail = reason(tmp_path, row)
    assert found == expected
    assert detail


def test_a_system_prompt_and_tools_belong_to_the_prompt(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "Be brief."}, USER]
    tool = [assistant_message(""), {"role": "tool", "content": "42"}, {"role": "tool", "content": "43"}]
    tool[0]["tool_calls"] = [{"name": "look"}]  # type: ignore[assignment]
    turns = [*before, *tool]
    [pair] = read(
        tmp_path, {"chosen": [*turns, assistant_message("x")], "rejected": [*turns, assistant_message("y")]}
    ).rows
    assert pair.prompt == turns


def test_a_file_without_a_usable_row_is_refused_with_the_reasons_and_what_was_wanted(tmp_path: Path) -> None:
    source = write(tmp_path, {"text": "x"}, {"text": "y"}, "{")
    with pytest.raises(DataError) as refused:
        read_preferences(source, field="--data")
    for words in ("--data must hold at least one usable row", "all 3", "2 missing column: rows 1, 2", "chosen and rej"):
        assert words in str(refused.value)


def test_what_was_read_is_reported_with_the_first_rows_of_each_reason(tmp_path: Path) -> None:
    empty = [{"prompt": "p", "chosen": "", "rejected": "y"}] * 7
    good: Sequence[Any] = [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]}]
    words = read(tmp_path, *good, *empty, "{").words()
    assert words[0].endswith("prefs.jsonl: 3 pairs from 1 row, ranked answers; 8 of 9 rows skipped")
    assert words[1:] == ["  7 empty answer: rows 2, 3, 4, 5, 6, …", "  1 broken line: row 9"]


def test_one_file_may_hold_rows_of_all_formats(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"chosen": f"{H}Why?{A}x", "rejected": f"{H}Why?{A}y"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "more": {"deep": [1, "two"]}},
        {"prompt": [USER], "chosen": [assistant_message("x")], "rejected": [assistant_message("y")], "more": 3},
    ]
    found = read(tmp_path, *rows)
    assert Counter(type(pair.prompt).__name__ for pair in found.rows) == {"str": 2, "list": 1}
    assert found.format == "explicit preferences and HH-RLHF dialogues"


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_precedes_the_prompt(tmp_path: Path, name: str) -> None:
    turns = [{"role": "user", "content": "p"}]
    rows = [
        {name: "Be kind.", "question": "p", "chosen": "a", "rejected": "b"},
        {name: "Be kind.", "prompt": turns, "chosen": "a", "rejected": "b"},
        {
            name: "Be kind.",
            "prompt": [{"role": "system", "content": "x"}, *turns],
            "chosen": "a",
            "rejected": "b",
        },
        {name: "", "prompt": "p", "chosen": "a", "rejected": "b"},
        {name: 7, "prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    found = read(tmp_path, *rows)
    assert [pair.prompt for pair in found.rows] == [
        "Be kind.\n\np",
        [{"role": "system", "content": "Be kind."}, *turns],
        [{"role": "system", "content": "x"}, *turns],
        "p",
    ]
    assert [(one.row, str(one.reason)) for one in found.skipped] == [(5, "wrong type")]
