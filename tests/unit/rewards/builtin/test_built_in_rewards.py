"""The built-in rewards that need no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from raftune.errors import ConfigError, RewardError
from raftune.rewards.builtin.answer import AnswerReward, boxed, canonical, last_number
from raftune.rewards.builtin.length import LengthReward
from raftune.rewards.builtin.regex import RegexReward
from raftune.rewards.builtin.repetition import RepetitionReward
from raftune.rewards.registry import BuiltInReward, built_in, builtin


@pytest.mark.parametrize(
    ("media", "is_dataclass", "doc", "name", "fix"),
    [
        ("text", True, "Help.", "new", "media must be a tuple of image, messages, text"),
        (("txt",), True, "Help.", "new", "media must be a tuple"),
        (("text",), False, "Help.", "new", "put @dataclass below @builtin"),
        (("text",), True, None, "new", "write a docstring"),
        (("text",), True, "Help.", "length", "LengthReward has this name already"),
    ],
)
def test_a_mistake_in_the_declaration_of_a_built_in_reward_is_named(
    media: Any, is_dataclass: bool, doc: str | None, name: str, fix: str
) -> None:
    reward: Any = type("New", (BuiltInReward,), {"__doc__": doc, "__annotations__": {"size": int}, "size": 1})
    with pytest.raises(TypeError, match=fix):
        builtin(name, media=media, example={})(dataclass(reward) if is_dataclass else reward)
    assert "new" not in built_in()


def values(reward: Any, completions: list[Any], **columns: Any) -> list[float | None]:
    return reward(prompts=["q"] * len(completions), completions=completions, **columns)


def test_a_pattern_is_searched_for_anywhere_or_must_match_the_whole_completion() -> None:
    texts = ["say yes", "yes", "no"]
    assert values(RegexReward("yes"), texts) == [1.0, 1.0, 0.0]
    assert values(RegexReward("yes", match=2.0, otherwise=-1.0, mode="fullmatch"), texts) == [-1.0, 2.0, -1.0]


def test_counting_multiplies_the_reward_by_the_matches_that_do_not_overlap() -> None:
    assert values(RegexReward("aa", match=0.5, otherwise=-1.0, mode="count"), ["aaaaa", "aa", "b"]) == [1.0, 0.5, -1.0]


def test_a_broken_pattern_is_refused_with_the_place_of_the_error() -> None:
    with pytest.raises(ConfigError, match=r"got '\(a': missing \), unterminated subpattern at position 0"):
        RegexReward("(a")


def test_messages_are_scored_by_their_content() -> None:
    said = [
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
    ]
    assert values(RegexReward("yes"), said) == [1.0, 0.0]
    assert values(LengthReward(target=3, unit="characters"), said) == [0.0, pytest.approx(-1 / 3)]


def test_length_falls_with_the_relative_distance_from_the_target() -> None:
    assert values(LengthReward(target=4), ["a b c d", "a b c d e f", "a", ""]) == [0.0, -0.5, -0.75, -1.0]


def test_length_is_best_anywhere_within_the_bounds() -> None:
    assert values(LengthReward(min=2, max=4), ["a", "a b", "a b c d", "a b c d e f"]) == [-0.5, 0.0, 0.0, -0.5]
    assert values(LengthReward(max=2, unit="characters"), ["", "ab", "abcd"]) == [0.0, 0.0, -1.0]


def test_length_in_tokens_counts_the_ids_that_were_generated() -> None:
    assert values(LengthReward(target=2, unit="tokens"), ["x", "x"], completion_ids=[[5, 2], [5, 6, 7, 2]]) == [
        0.0,
        -1.0,
    ]
    with pytest.raises(RewardError, match="unit: tokens needs completion_ids"):
        values(LengthReward(target=2, unit="tokens"), ["x"])


@pytest.mark.parametrize("options", [{}, {"target": 3, "max": 4}, {"min": 5, "max": 4}, {"target": -1}])
def test_a_length_that_cannot_be_meant_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="length"):
        LengthReward(**options)


def test_repetition_is_minus_the_share_of_repeated_ngrams() -> None:
    texts = ["a b a b a b", "A b a B", "one two three", "one", ""]
    assert values(RepetitionReward(ngram_size=2), texts) == pytest.approx([-0.6, -1 / 3, 0.0, 0.0, 0.0])
    assert values(RepetitionReward(ngram_size=1, unit="tokens"), ["x"], completion_ids=[[7, 7, 7, 2]]) == [-0.5]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 42.", "42"),
        ("1 then 1,000", "1000"),
        ("$1,234.50 in all", "1234.5"),
        ("-3.5", "-3.5"),
        ("−3", "-3"),
        ("costs -$7", "-7"),
        ("3-5", "5"),
        ("one of 1,2,3", "3"),
        ("**18**", "18"),
        ("#### 42", "42"),
        ("is .5", "0.5"),
        ("1,00000", "0"),
        ("v2b is not a number", None),
        ("none", None),
    ],
)
def test_the_last_number_of_a_text_is_found(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


def test_boxed_keeps_inner_braces_and_takes_the_last_box_that_closes() -> None:
    assert boxed(r"\boxed{1} so \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


def test_equal_answers_in_other_spelling_are_equal() -> None:
    assert canonical("1,000") == canonical("$1000.") == canonical(" 1000.0 ")
    assert canonical("The  Sun.") == canonical("the sun")
    assert canonical("1000") != canonical("100")


def test_answers_are_compared_with_the_column_as_numbers() -> None:
    texts = ["It is 1,000.", "I think 7, no, 8", "no idea", "42", "42"]
    wanted = ["1000", 7, "3", "step by step <<6*7=42>>\n#### 42", None]
    assert values(AnswerReward(), texts, answer=wanted) == [1.0, 0.0, 0.0, 1.0, None]


def test_a_boxed_answer_counts_only_in_its_box() -> None:
    texts = [r"so \boxed{42}", "42", r"\boxed{\frac{1}{2}}", r"\boxed{2}"]
    assert values(AnswerReward(extract="boxed"), texts, answer=["42", "42", r"\frac{1}{2}", r"thus \boxed{2.0}"]) == [
        1.0,
        0.0,
        1.0,
        1.0,
    ]


def test_an_exact_answer_is_the_whole_completion() -> None:
    assert values(AnswerReward("label", "exact"), ["Paris.", "in Paris", "$5"], label=["paris", "Paris", "5.00"]) == [
        1.0,
        0.0,
        1.0,
    ]


def test_a_column_without_an_answer_of_the_asked_kind_does_not_apply() -> None:
    assert values(AnswerReward(), ["yes", "4"], answer=["yes", ""]) == [None, None]


def test_a_missing_answer_column_is_named_with_those_that_are_there() -> None:
    with pytest.raises(RewardError, match="answer needs the column 'answer'; the data has: solution"):
        values(AnswerReward(), ["1"], solution=["1"])


def test_the_values_do_not_depend_on_how_samples_are_batched() -> None:
    texts = [f"word {'again ' * (i % 5)} {i}" for i in range(40)]
    columns = {"answer": [i // 2 * 2 for i in range(40)]}
    for reward in (RegexReward("again", mode="count"), LengthReward(target=4), AnswerReward(), RepetitionReward()):
        single = [values(reward, [text], answer=[columns["answer"][i]])[0] for i, text in enumerate(texts)]
        assert values(reward, texts, **columns) == single


def test_a_fingerprint_follows_the_options_and_not_the_name() -> None:
    other = RegexReward("a")
    other.name = "other"
    assert RegexReward("a").fingerprint == other.fingerprint
    different = [
        RegexReward("a"),
        RegexReward("b"),
        RegexReward("a", match=2.0),
        RegexReward("a", mode="count"),
        LengthReward(target=3),
        LengthReward(min=3),
        LengthReward(max=3),
    ]
    different += [
        AnswerReward(),
        AnswerReward("solution"),
        AnswerReward(extract="boxed"),
        RepetitionReward(),
        RepetitionReward(2),
    ]
    assert len({reward.fingerprint for reward in different}) == len(different)
