"""Which candidates a rule keeps, with what weight and reason, on tables small enough to check by eye."""

from typing import Any

import numpy as np
import pytest
from selection_tables import CONFIGS, INF, NAN, assert_same, choose, kept, prompts, random_table, rows, words

from raftune.config import selection as sections
from raftune.selection import RULES, Reason, nothing_to_rank, without_candidates


def test_every_rule_of_the_configuration_has_a_function_and_a_table_of_its_own() -> None:
    assert set(sections.RULES) == {*RULES, "custom"}
    assert {fields.get("rule", "best_of_k") for fields in CONFIGS} == set(RULES)


# -- best of k and top m ---------------------------------------------------------------------------------------------


def test_the_best_of_each_prompt_is_kept_and_every_candidate_is_ranked() -> None:
    verdicts = choose(prompts([1, 3, 2], [-5, -7]))
    assert verdicts.weight.tolist() == [0, 1, 0, 1, 0]
    assert verdicts.rank.tolist() == [3, 1, 2, 1, 2]
    won, lost = "best of its prompt", "a better one was kept"
    assert words(verdicts) == [lost, won, lost, won, lost]


def test_ties_go_to_the_lower_index() -> None:
    verdicts = choose(prompts([1, 2, 2, 2], [0.0, -0.0]), all_equal="keep")
    assert kept(verdicts) == [1, 4]
    assert verdicts.rank.tolist() == [4, 1, 2, 3, 1, 2]
    assert words(verdicts)[2:4] == ["tied with a better index"] * 2


def test_ties_go_to_the_lower_index_and_not_to_the_earlier_row() -> None:
    table = prompts([7, 7, 7, 1])
    assert choose(rows(table, np.array([3, 2, 1, 0]))).rank.tolist() == [4, 3, 2, 1]


def test_top_m_keeps_exactly_m_and_all_of_a_prompt_that_has_fewer() -> None:
    verdicts = choose(prompts([5, 1, 4, 3], [2], [1, 1, 1]), rule="top_m", m=2)
    assert kept(verdicts) == [0, 2, 4, 5, 6]
    assert verdicts.weight.max() == 1
    assert words(verdicts) == [
        "best of its prompt",
        "a better one was kept",
        "among the best of its prompt",
        "a better one was kept",
        Reason.ONLY_ONE.words,
        Reason.KEPT_EQUAL.words,
        Reason.KEPT_EQUAL.words,
        "tied with a better index",
    ]


@pytest.mark.parametrize("m", [1, 2, 3, 7])
def test_top_m_keeps_the_smaller_of_m_and_what_is_usable_of_every_prompt(m: int) -> None:
    table = random_table(m, groups=200)
    verdicts = choose(table, rule="top_m", m=m)
    for group in np.unique(table.group):
        mine = table.group == group
        assert verdicts.weight[mine].sum() == min(m, np.isfinite(table.score[mine]).sum())


def test_best_of_k_is_top_1() -> None:
    table = random_table(3)
    assert_same(choose(table), choose(table, rule="top_m", m=1))


# -- the screen ------------------------------------------------------------------------------------------------------


def test_no_rule_ever_keeps_a_score_that_is_not_finite() -> None:
    table = prompts([NAN, 1, INF, -INF], [NAN, INF])
    for fields in CONFIGS:
        verdicts = choose(table, **{**fields, "min_length": None, "max_length": None, "margin": 0, "all_equal": "keep"})
        assert set(kept(verdicts)) <= {1}
        assert verdicts.rank.tolist() == [0, 1, 0, 0, 0, 0]
        assert [words(verdicts)[i] for i in (0, 2, 3, 4, 5)] == ["no usable score"] * 5


def test_lengths_on_the_edge_of_the_window_compete_and_others_do_not() -> None:
    table = prompts([1, 2, 3, 4], lengths=[3, 5, 2, 6])
    verdicts = choose(table, min_length=3, max_length=5)
    assert kept(verdicts) == [1]
    assert verdicts.rank.tolist() == [2, 1, 0, 0]
    assert words(verdicts)[2:] == ["too short", "too long"]


def test_of_identical_completions_only_the_lowest_usable_index_competes() -> None:
    table = prompts([5, 5, NAN, 5], [5, 5], contents=[8, 8, 9, 9, 8, 9])
    verdicts = choose(table, rule="top_m", m=4, drop_duplicates=True)
    # Index 3 repeats 2, which has no score and so takes nothing away. Another prompt's completions are not compared.
    assert kept(verdicts) == [0, 3, 4, 5]
    assert words(verdicts)[1] == "duplicate of a lower index"
    assert kept(choose(table, rule="top_m", m=4)) == [0, 1, 3, 4, 5]


# -- skipped prompts -------------------------------------------------------------------------------------------------


def test_prompts_whose_usable_scores_are_all_equal_are_kept_or_skipped_as_configured() -> None:
    table = prompts([2, 2, NAN], [2, 3], [1])
    verdicts = choose(table, all_equal="keep")
    assert kept(verdicts) == [0, 4, 5]
    assert words(verdicts)[0] == Reason.KEPT_EQUAL.words
    assert words(verdicts)[5] == Reason.ONLY_ONE.words
    verdicts = choose(table, all_equal="skip")
    assert kept(verdicts) == [4]
    assert words(verdicts)[:3] == [Reason.ALL_EQUAL.words] * 2 + ["no usable score"]
    assert words(verdicts)[5] == Reason.LEFT_ALONE.words
    assert verdicts.rank.tolist() == [1, 2, 0, 2, 1, 1]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [3, 6]),
        ({"rule": "top_m", "m": 2}, [2, 3, 6]),
        ({"rule": "softmax", "temperature": 1}, [2, 3, 6]),
        ({"rule": "random"}, [2, 6]),
        ({"rule": "threshold", "threshold": 1}, [3, 4, 5, 6]),
        ({"rule": "top_fraction", "keep_fraction": 0.75, "max_per_prompt": 1}, [0, 3, 4, 6]),
    ],
)
def test_by_default_wrong_completions_alone_teach_nothing_and_a_single_candidate_is_kept(
    fields: dict[str, Any], expected: list[int]
) -> None:
    """All wrong, one right, all right, one candidate: what is skipped is what a rule would have ranked, and cannot."""
    table = prompts([0, 0], [0, 1], [1, 1], [0] if "threshold" not in fields else [1])
    verdicts = choose(table, seed=2, all_equal="auto", **fields)
    assert kept(verdicts) == expected
    assert nothing_to_rank(table, verdicts) == {0: 0.0, 2: 1.0}


def test_a_candidate_without_other_scored_candidates_was_not_ranked() -> None:
    table = prompts([NAN, 0], [1, 2])
    assert kept(choose(table, all_equal="auto")) == [3]
    assert nothing_to_rank(table, choose(table)) == {0: 0.0}


def test_where_no_scores_are_equal_the_default_keeps_what_keep_does() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = prompts(*rng.normal(size=(12, 4)))
        for fields in CONFIGS:
            if "all_equal" not in fields:
                assert_same(choose(table, seed, **fields, all_equal="auto"), choose(table, seed, **fields))


def test_a_best_that_exceeds_its_mean_by_just_the_margin_is_kept() -> None:
    table = prompts([0, 1], [0, 0.75], [1, 1])
    assert kept(choose(table, margin=0.5)) == [1]
    assert words(choose(table, margin=0.5))[2:] == ["prompt skipped: margin too small"] * 4
    assert kept(choose(table, margin=0.375)) == [1, 3]


def test_skipping_looks_at_those_that_compete_alone() -> None:
    table = prompts([1, 1, 9], lengths=[1, 1, 50])
    assert kept(choose(table, all_equal="skip")) == [2]
    assert kept(choose(table, all_equal="skip", max_length=10)) == []


def test_margins_survive_scores_near_the_largest_float() -> None:
    assert kept(choose(prompts([-1.7e308, 1.7e308], [1e308, 1e308]), margin=1)) == [1]


# -- the best share of all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "fraction", "expected"),
    [(100, 0.29, 29), (10, 0.3, 3), (8, 0.01, 1), (7, 0.5, 3), (5, 1, 5), (1000, 0.007, 7)],
)
def test_the_kept_share_is_rounded_down_but_never_to_none(n: int, fraction: float, expected: int) -> None:
    verdicts = choose(
        prompts(*np.arange(n, dtype=float)[:, None].tolist()), rule="top_fraction", keep_fraction=fraction
    )
    assert kept(verdicts) == list(range(n - expected, n))


def test_the_share_is_of_those_that_compete_over_all_prompts() -> None:
    table = prompts([9, 8, NAN, NAN], [7, 1, 2, 3], [INF, NAN])
    verdicts = choose(table, rule="top_fraction", keep_fraction=0.5)
    assert kept(verdicts) == [0, 1, 4]
    assert words(verdicts)[:6] == ["inside the kept fraction"] * 2 + ["no usable score"] * 2 + [
        "inside the kept fraction",
        "outside the kept fraction",
    ]


def test_the_cap_of_a_prompt_frees_its_places_for_others() -> None:
    table = prompts([9, 8, 7, 6], [5, 4], [3, 2])
    verdicts = choose(table, rule="top_fraction", keep_fraction=0.5, max_per_prompt=2)
    assert kept(verdicts) == [0, 1, 4, 5]
    assert words(verdicts)[2:4] == ["beyond max_per_prompt of its prompt"] * 2
    assert kept(choose(table, rule="top_fraction", keep_fraction=1, max_per_prompt=1)) == [0, 4, 6]


@pytest.mark.slow
def test_ties_at_the_cut_are_broken_by_seed_and_all_alike() -> None:
    # 6 candidates tie for 2 places; each prompt holds 3, so E[places of the second] = 1 with variance 2·½·½·4/5 = 0.4.
    # 4000 seeds: standard error 0.01; five of them are a false alarm of 6e-7.
    table = prompts([5, 5, 5, 1], [5, 5, 5, 9])
    places = np.array([choose(table, seed, rule="top_fraction", keep_fraction=0.375).weight for seed in range(4000)])
    assert (places.sum(axis=1) == 3).all() and (places[:, 7] == 1).all() and (places[:, 3] == 0).all()
    assert abs(places[:, 4:7].sum(axis=1).mean() - 1) < 0.05
    # Inside a prompt the lower index goes first.
    assert (np.diff(places[:, :3], axis=1) <= 0).all() and (np.diff(places[:, 4:7], axis=1) <= 0).all()


def test_a_tie_that_was_broken_at_random_says_so() -> None:
    verdicts = choose(prompts([5], [5], [1]), rule="top_fraction", keep_fraction=0.4)
    assert sorted(words(verdicts)) == [
        "inside the kept fraction",
        "outside the kept fraction",
        "tied at the cut of the kept fraction, not chosen",
    ]


# -- threshold, softmax, random --------------------------------------------------------------------------------------


def test_a_score_at_the_threshold_reaches_it() -> None:
    verdicts = choose(prompts([0.5, 0.49, 3], [0]), rule="threshold", threshold=0.5)
    assert verdicts.weight.tolist() == [1, 0, 1, 0]
    reaches, below = "reaches the threshold", "below the threshold"
    assert words(verdicts) == [reaches, below, reaches, below]


def test_the_cap_of_a_threshold_keeps_the_best_of_a_prompt() -> None:
    verdicts = choose(prompts([2, 4, 2, 1], [3]), rule="threshold", threshold=2, max_per_prompt=2)
    assert kept(verdicts) == [0, 1, 4]
    assert words(verdicts)[2:4] == ["beyond max_per_prompt of its prompt", "below the threshold"]


def test_softmax_weights_sum_to_one_in_each_prompt_and_follow_the_scores() -> None:
    verdicts = choose(prompts([0, 1, NAN], [5]), rule="softmax", temperature=0.5)
    np.testing.assert_allclose(verdicts.weight, [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2), 0, 1], rtol=1e-14)
    assert set(words(verdicts)) == {"weighted by its score", "no usable score", Reason.ONLY_ONE.words}


def test_softmax_survives_any_scores_and_temperature() -> None:
    table = prompts([1.7e308, -1.7e308], [1e300, 1e300], [-800, 0])
    for temperature in (1e-300, 1.0, 1e300):
        weight = choose(table, rule="softmax", temperature=temperature).weight
        np.testing.assert_allclose(np.add.reduceat(weight, [0, 2, 4]), 1)
    assert words(choose(table, rule="softmax", temperature=1))[4] == "weight too small to represent"


@pytest.mark.slow
def test_the_control_keeps_m_of_each_prompt_with_equal_chances_whatever_they_score() -> None:
    # Each of 4 candidates is kept with probability ½. 4000 seeds: standard error 0.0079, five of them 0.04.
    table = prompts([9, 1, 1, 0, NAN], [3])
    generated = np.array([choose(table, seed, rule="random", m=2).weight for seed in range(4000)])
    assert (generated.sum(axis=1) == 3).all() and not generated[:, 4].any() and generated[:, 5].all()
    np.testing.assert_allclose(generated[:, :4].mean(axis=0), 0.5, atol=0.04)
    # Of the 6 pairs each is as likely (1/6, standard error 0.0059): candidates are generated, not positions.
    pairs = np.bincount((generated[:, :4] @ [1, 2, 4, 8]).astype(int), minlength=16)[[3, 5, 6, 9, 10, 12]] / 4000
    np.testing.assert_allclose(pairs, 1 / 6, atol=0.03)


def test_the_control_samples_prompts_independently() -> None:
    table = prompts(*[[0.0, 0.0]] * 20000)
    first = choose(table, 1, rule="random").weight[::2]
    # A fair coin for each: standard error of the mean .0035, of the lag-1 agreement .0035; five of them .018.
    assert abs(first.mean() - 0.5) < 0.018
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.018
    assert abs((first == choose(table, 2, rule="random").weight[::2]).mean() - 0.5) < 0.018


def test_only_the_control_and_cut_ties_depend_on_the_seed() -> None:
    table = random_table(5)
    for fields in CONFIGS:
        same = (choose(table, 1, **fields).weight == choose(table, 2, **fields).weight).all()
        assert same == (fields.get("rule") not in ("random", "top_fraction")), fields


def test_any_integer_is_a_seed() -> None:
    table = random_table(6)
    outcomes = [choose(table, seed, rule="random").weight.tolist() for seed in (-1, 0, 2**63 - 1, 2**62 + 5)]
    assert len({tuple(outcome) for outcome in outcomes}) == 4


# -- prompts that yield nothing --------------------------------------------------------------------------------------


def test_a_prompt_without_kept_samples_is_named_with_its_reason() -> None:
    table = prompts([NAN, NAN], [1, 1], [NAN, 2, 2], [3, 5], lengths=[1, 1, 9, 9, 1, 9, 9, 1, 1])
    verdicts = choose(table, max_length=5)
    assert without_candidates(table, verdicts) == {
        0: "no usable score",
        1: "too long",
        2: "too long (2 of 3), no usable score (1 of 3)",
    }


def test_a_skipped_prompt_is_named_as_skipped_even_if_some_did_not_compete() -> None:
    table = prompts([1, 1, NAN], [1, 2])
    assert without_candidates(table, choose(table, all_equal="skip")) == {0: "nothing to rank: all candidates score 1"}
    assert without_candidates(table, choose(table, margin=0.5)) == {0: "prompt skipped: margin too small"}
