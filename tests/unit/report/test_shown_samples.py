"""A page that cannot hold everything holds what teaches most, and the same of it every time."""

from __future__ import annotations

import pytest

from raftune.report.samples import (
    LONGEST,
    MOST_ROUNDS,
    HeldOutPair,
    PromptGroup,
    content,
    cut,
    embedded,
    encoded_size,
    finite,
    first,
    in_turn,
    order_groups,
    order_pairs,
    rounds_seen,
    up_to,
)


def group(name: str, margin: float | None = 0.0, without_candidates: bool = False) -> PromptGroup:
    return PromptGroup(1, 0, 0, name, 4, margin, without_candidates)


def test_largest_margins_barren_prompts_and_hashes_take_turns() -> None:
    groups = [
        group("d", 9.0),
        group("b", 8.0),
        group("c", None, without_candidates=True),
        group("a", 1.0),
        group("e", 5.0),
    ]
    assert [g.prompt_id for g in order_groups(groups, 9)] == ["d", "c", "a", "b", "e"]


def test_the_order_of_prompts_does_not_depend_on_the_order_in_which_they_are_found() -> None:
    groups = [group(name, margin) for name, margin in zip("abcdefgh", (3, 1, 4, 1.5, 9, 2, 6, 5), strict=True)]
    assert order_groups(groups, 5) == order_groups(groups[::-1], 5)


def test_gains_losses_and_hashes_take_turns() -> None:
    pairs = [
        HeldOutPair(0, name, 0, gain) for name, gain in (("x", 2.0), ("y", -3.0), ("a", 0.1), ("z", None), ("w", 1.0))
    ]
    assert [p.prompt_id for p in order_pairs(pairs, 9)] == ["x", "y", "a", "w", "z"]


def test_in_turn_ends_with_the_longest_list() -> None:
    assert list(in_turn([1, 2, 3], [], "a")) == [1, "a", 2, 3]


def test_first_takes_no_key_twice_and_no_more_than_it_may() -> None:
    assert first([3, 3, 1, 2], 2, lambda n: n) == [3, 1]
    assert first([3], 0, lambda n: n) == []


def test_items_are_taken_while_they_fit_and_one_always_is() -> None:
    assert up_to([3, 4, 5], 7, lambda n: n) == [3, 4]
    assert up_to([9, 1], 7, lambda n: n) == [9]
    assert up_to([], 7, lambda n: n) == []


def test_a_size_is_that_of_the_utf8_that_is_written() -> None:
    assert encoded_size("aé日") == 2 + 1 + 2 + 3
    assert encoded_size("\ud800") > 0


def test_completions_of_code_and_markup_weigh_what_their_escapes_weigh_in_the_page() -> None:
    items = ["<a>&" * 100] * 50
    kept = up_to(items, 20_000, encoded_size)
    assert 0 < len(kept) < len(items)
    assert sum(len(embedded(item).encode()) for item in kept) <= 20_000


def test_a_long_text_is_cut_at_a_stated_length_and_says_how_much_follows() -> None:
    text = "x" * (LONGEST + 12_345)
    assert cut(text) == "x" * LONGEST + "… (12,345 more characters)"
    assert cut("x" * LONGEST) == "x" * LONGEST
    (message,) = content([{"role": "user", "content": text, "name": None}])
    assert message == {"role": "user", "content": cut(text)}


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "3", True, [1.0]])
def test_what_is_no_number_is_null(value: object) -> None:
    assert finite(value) is None


def test_content_that_is_no_text_stays_what_json_can_hold() -> None:
    assert content(3) == 3
    turns = [{"role": "user", "content": "x" * 3000} for _ in range(1000)]
    shown = content(turns)
    assert shown[:5] == turns[:5] and len(shown) == 7
    assert shown[-1] == {"role": "…", "content": "… (994 more)"}
    assert content(["y"] * 2000)[-1] == "… (1,058 more)", "numbers of items are bounded too"
    assert content(turns[:5]) == turns[:5]
    assert content(float("nan")) is None
    assert content(b"\x89PNG") == "(4 bytes)"
    assert content({"image": "data:,x"}) == {"image": "data:,x"}


def test_of_many_rounds_the_start_the_best_the_last_and_those_of_alarms_have_their_images() -> None:
    assert rounds_seen([0, 1, 2], 1, set()) == [0, 1, 2]
    seen = rounds_seen(list(range(51)), 33, {7, 99})
    assert seen == sorted(seen)
    assert len(seen) == MOST_ROUNDS
    assert {0, 33, 50, 7} <= set(seen)
