"""Measures of variety against counts by hand, closed forms, and the plain way of computing them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from raftune.evaluation.diversity import (
    distinct,
    msttr,
    near_duplicates,
    numbered,
    similarities,
    unique,
)


def similarity(groups: list[list[str]]) -> float | None:
    """The mean over groups of the mean similarity of two texts of a group."""
    members = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    values = similarities([text for group in groups for text in group], members)
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


FABLE = ["The cat saw the cat.", "the cat!", ""]


def test_distinct_counts_different_n_grams_over_all() -> None:
    assert distinct(FABLE, 1) == 3 / 7
    assert distinct(FABLE, 2) == 3 / 5  # the-cat, cat-saw, saw-the; the-cat three times of five


def test_unique_counts_n_grams_that_occur_once_in_the_whole_set() -> None:
    assert unique(FABLE, 1) == 1
    assert unique(FABLE, 2) == 2
    assert unique(["a b", "a b"], 2) == 0


def test_no_n_gram_crosses_from_one_text_to_the_next() -> None:
    assert unique(["a", "b"], 2) is None
    assert distinct(["a b", "c"], 2) == 1.0
    assert distinct(["a b", "c"], 4) is None


def test_without_words_there_is_nothing_to_measure() -> None:
    for nothing in ([], [""], ["…", " "]):
        assert distinct(nothing, 1) is None
        assert unique(nothing, 1) is None
        assert msttr(nothing) is None


def test_n_grams_are_counted_as_by_hand_on_random_texts() -> None:
    chance = random.Random(0)
    texts = [" ".join(chance.choice("abcd") for _ in range(chance.randrange(9))) for _ in range(60)]
    for n in (1, 2, 3, 5):
        grams = Counter(
            tuple(words[i : i + n])
            for words in (re.findall(r"\w+", t) for t in texts)
            for i in range(len(words) - n + 1)
        )
        assert distinct(texts, n) == len(grams) / sum(grams.values())
        assert unique(texts, n) == sum(1 for times in grams.values() if times == 1)


def test_msttr_is_the_mean_share_of_different_words_in_whole_segments() -> None:
    assert msttr(["a b"] * 50) == 2 / 100
    assert msttr(["a"] * 99) is None
    texts = [" ".join(f"w{i}" for i in range(150)), "x " * 50, "left over"]
    assert msttr(texts) == (1.0 + 51 / 100) / 2


def test_words_numbered_once_measure_as_their_texts_do() -> None:
    words = numbered(text for text in FABLE)
    assert [distinct(words, 2), unique(words, 1), msttr(words, 3)] == [
        distinct(FABLE, 2),
        unique(FABLE, 1),
        msttr(FABLE, 3),
    ]


def test_equal_texts_are_of_similarity_one_and_texts_without_a_shared_pair_of_zero() -> None:
    assert similarity([["Red fox.", "red fox", "RED FOX"]]) == pytest.approx(1.0, abs=1e-12)
    assert similarity([["", "…"]]) == pytest.approx(1.0, abs=1e-12)
    assert similarity([["a b", "c d"], ["only one"]]) == pytest.approx(0.0, abs=1e-12)
    assert similarity([["only one"], []]) is None


def test_similarity_is_the_mean_cosine_over_all_pairs_of_a_group() -> None:
    chance = random.Random(1)
    groups = [[" ".join(chance.choices("abc", k=chance.randrange(7))) for _ in range(6)] for _ in range(5)]
    expected = [np.mean([cosine(a, b) for a, b in combinations(group, 2)]) for group in groups]
    texts = [text for group in groups for text in group]
    np.testing.assert_allclose(similarities(texts, np.repeat(np.arange(5), 6)), expected, atol=1e-12)
    shuffled = chance.sample(range(30), 30)
    again = similarities([texts[i] for i in shuffled], np.array(shuffled) // 6)
    np.testing.assert_allclose(again, expected, atol=1e-12)


def cosine(left: str, right: str) -> float:
    a, b = (Counter(zip(["<", *text.split()], [*text.split(), ">"], strict=True)) for text in (left, right))
    norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(a[pair] * b[pair] for pair in a) / norms


def test_texts_that_differ_in_case_and_signs_alone_are_duplicates_at_any_threshold() -> None:
    texts = ["Open the door.", "close it", "open THE door!", "", "?", "a word more: open the door"]
    assert near_duplicates(texts, 1.0) == [[0, 2], [3, 4]]


@pytest.mark.slow
def test_near_duplicates_are_those_of_every_pair_compared() -> None:
    """Each linked pair is seen but for one in a million; 40 clusters of 12, seeds fixed."""
    chance = random.Random(2)
    texts = []
    for _ in range(40):
        words = [f"w{chance.randrange(300)}" for _ in range(30)]
        for _ in range(12):
            changed = list(words)
            for _ in range(chance.randrange(4)):
                changed[chance.randrange(30)] = f"w{chance.randrange(300)}"
            texts.append(" ".join(changed))
    for threshold in (0.5, 0.7, 0.8, 0.9):
        assert near_duplicates(texts, threshold) == slow_clusters(texts, threshold)


def slow_clusters(texts: list[str], threshold: float) -> list[list[int]]:
    pairs = [set(zip(["<", *text.split()], [*text.split(), ">"], strict=True)) for text in texts]
    cluster = list(range(len(texts)))
    for i, j in combinations(range(len(texts)), 2):
        if cluster[i] != cluster[j] and len(pairs[i] & pairs[j]) >= threshold * len(pairs[i] | pairs[j]):
            old, new = cluster[j], cluster[i]
            cluster = [new if c == old else c for c in cluster]
    groups = [[i for i, c in enumerate(cluster) if c == name] for name in dict.fromkeys(cluster)]
    return sorted((g for g in groups if len(g) > 1), key=lambda g: (-len(g), g[0]))


@pytest.mark.slow
def test_ten_thousand_texts_that_all_say_nearly_the_same_are_one_cluster() -> None:
    texts = [
        f"I am happy to help you with that today, my dear friend number {i} of the day, ask away" for i in range(10_000)
    ]
    assert near_duplicates(texts, 0.7) == [list(range(10_000))]


@pytest.mark.parametrize("wrong", [0.0, 1.5, -1.0, float("nan")])
def test_a_threshold_outside_its_range_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        near_duplicates(["a"], wrong)


def test_nothing_has_no_duplicates() -> None:
    assert near_duplicates([]) == near_duplicates(["alone"]) == []
