"""Prompts stay on one side; what is held out is a function of prompts and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raftune.data.classifier_inputs import ClassifierInputs
from raftune.errors import DataError
from raftune.reward_models.examples import (
    FeedbackExample,
    identity_of,
    prompt_key,
    read_examples,
    split_by_prompt,
    without_overlap,
)
from tests.builders import tiny_tokenizer
from tests.unit.reward_models.feedback_files import config_for, write


def example(prompt: Any, row: int = 1) -> FeedbackExample:
    return FeedbackExample(row, prompt, ("a", "b"), ([1], [2]))


EXAMPLES = [example(f"p{i % 100}", i) for i in range(250)]


def test_all_rows_of_a_prompt_are_on_one_side() -> None:
    split = split_by_prompt(EXAMPLES, 0.25, 0)
    train, held_out = ({one.prompt for one in side} for side in (split.train, split.held_out))
    assert not train & held_out and len(held_out) == 25 and len(split.train) + len(split.held_out) == 250


def test_a_small_share_of_few_prompts_is_raised_to_what_can_show_something() -> None:
    assert len({one.prompt for one in split_by_prompt(EXAMPLES, 0.01, 0).held_out}) == 20
    few = [example(f"p{i}", i) for i in range(9)]
    assert len(split_by_prompt(few, 0.1, 0).held_out) == 4


def test_the_order_of_the_rows_does_not_move_a_prompt_and_the_seed_does() -> None:
    sides = [split_by_prompt(rows, 0.25, seed) for rows, seed in ((EXAMPLES, 0), (EXAMPLES[::-1], 0), (EXAMPLES, 1))]
    chosen = [{one.prompt for one in split.held_out} for split in sides]
    assert chosen[0] == chosen[1] != chosen[2]


def test_messages_are_prompts_too() -> None:
    rows = [example([{"role": "user", "content": f"p{i % 4}"}], i) for i in range(8)]
    split = split_by_prompt(rows, 0.5, 0)
    assert len(split.held_out) == 4 and len({prompt_key(row.prompt, 0) for row in rows}) == 4


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DataError, match="data must have at least two prompts"):
        split_by_prompt([example("p"), example("p")], 0.5, 0)
    assert len(split_by_prompt([example("p"), example("q")], 0.9, 0).train) == 1


def test_held_out_rows_whose_prompts_are_learned_from_are_left_out_and_counted() -> None:
    split = without_overlap(EXAMPLES[:90], EXAMPLES, "test.jsonl")
    assert {one.prompt for one in split.held_out} == {f"p{i}" for i in range(90, 100)}
    assert split.words == ("230 of 250 held-out rows left out: their prompts are learned from",)
    with pytest.raises(DataError, match=r"all 30 rows of test\.jsonl have prompts that are learned from"):
        without_overlap(EXAMPLES, EXAMPLES[:30], "test.jsonl")


def test_a_held_out_file_is_read_for_the_same_objective(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(6)]
    data, other = write(tmp_path / "a.jsonl", rows[:4]), write(tmp_path / "b.jsonl", rows[3:])
    config = config_for(data, tmp_path, tmp_path, held_out=str(other))
    source, split = read_examples(config, tiny_tokenizer(), ClassifierInputs())
    assert source.objective == "pairwise" and [len(split.train), len(split.held_out)] == [4, 2]
    rated = write(tmp_path / "c.jsonl", [{"prompt": "p", "completion": "a", "score": 1}])
    with pytest.raises(DataError, match="held_out must hold at least one usable row"):
        read_examples(config_for(data, tmp_path, tmp_path, held_out=str(rated)), tiny_tokenizer(), ClassifierInputs())


def test_pairs_that_are_alike_once_they_are_cut_are_skipped_and_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    rows = [{"prompt": "p", "chosen": "a" + "x" * 20, "rejected": "b" + "x" * 20}]
    rows += [{"prompt": f"q{i}", "chosen": "c", "rejected": "d"} for i in range(3)]
    config = config_for(write(tmp_path / "a.jsonl", rows), tmp_path, tmp_path)
    source, _ = read_examples(config, tokenizer, ClassifierInputs(limit=10))
    assert [(one.row, one.reason) for one in source.skipped] == [(1, "the same tokens")]
    alike = config_for(write(tmp_path / "b.jsonl", rows[:1]), tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"the same within the last 10 tokens\. Raise max_length"):
        read_examples(alike, tokenizer, ClassifierInputs(limit=10))


def test_ranked_completions_are_pairs_of_one_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completions": ["a", "b", "c"], "ranks": [1, 2, 3]} for i in range(4)]
    source, split = read_examples(
        config_for(write(tmp_path / "a.jsonl", rows), tmp_path, tmp_path), tiny_tokenizer(), ClassifierInputs()
    )
    assert source.objective == "pairwise" and [len(split.train), len(split.held_out)] == [6, 6]


def test_the_identity_goes_with_tokens_and_sides() -> None:
    split = split_by_prompt(EXAMPLES, 0.25, 0)
    assert identity_of(split) == identity_of(split_by_prompt(EXAMPLES, 0.25, 0))
    assert identity_of(split) != identity_of(split_by_prompt(EXAMPLES, 0.5, 0))
    assert identity_of(split) != identity_of(split_by_prompt(EXAMPLES[1:], 0.25, 0))
