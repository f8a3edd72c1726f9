"""The paired comparison against exact enumeration, and its error rates by simulation."""

from __future__ import annotations

import itertools
from math import erf

import numpy as np
import pytest

from raftune.evaluation.paired import (
    EXACT,
    FEWEST,
    FLIPS,
    PairedTest,
    estimate,
    judged,
    outcomes,
    paired,
    sign_flip,
)

NAN = float("nan")


def enumerated(differences: np.ndarray) -> float:
    """The two-sided p by looking at every assignment of signs, one after another."""
    seen = abs(sum(differences))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in every(len(differences))]
    return sum(found >= seen - 1e-9 for found in sums) / len(sums)


def every(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((-1, 1), repeat=n))


def compared(groups: list[int], a: list[float], b: list[float], **options: float) -> PairedTest:
    found = paired(np.array(groups), np.array(a), np.array(b), **options)
    assert found is not None
    return found


# -- shares and means --------------------------------------------------------------------------------------------------


def test_shares_are_means_over_prompts_of_the_shares_among_their_pairs() -> None:
    found = compared([0, 0, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1])
    assert (found.wins, found.ties, found.losses) == (0.25, 0.125, 0.625)  # (2/4 + 0)/2, (1/4 + 0)/2, (1/4 + 1)/2
    assert found.win_rate.mean == 0.25 + 0.125 / 2
    assert (found.pairs, found.prompts) == (5, 2)
    assert found.difference is not None
    assert found.difference.mean == (1 / 4 - 1) / 2


def test_random_tables_agree_with_counting_by_hand() -> None:
    generator = np.random.default_rng(1)
    for _ in range(50):
        groups = generator.integers(0, 5, 30)
        a, b = generator.integers(0, 4, (2, 30)).astype(float)
        found = paired(groups, a, b)
        assert found is not None
        tables = [np.sign(a - b)[groups == prompt] for prompt in set(groups.tolist())]
        wins, losses = (np.mean([np.mean(table == sign) for table in tables]) for sign in (1, -1))
        gap = np.mean([np.mean((a - b)[groups == prompt]) for prompt in set(groups.tolist())])
        assert found.difference is not None
        np.testing.assert_allclose(
            [found.wins, found.losses, found.difference.mean, found.wins + found.ties + found.losses],
            [wins, losses, gap, 1.0],
            atol=1e-12,
        )


def test_a_against_b_is_b_against_a_mirrored() -> None:
    generator = np.random.default_rng(2)
    groups, a, b = np.repeat(np.arange(20), 3), generator.normal(size=60), generator.normal(0.3, 1, 60)
    there, back = paired(groups, a, b), paired(groups, b, a)
    assert there is not None and back is not None
    assert (there.wins, there.ties, there.losses) == (back.losses, back.ties, back.wins)
    assert there.p == back.p
    assert there.difference is not None and back.difference is not None
    assert there.difference.mean == -back.difference.mean


def test_a_pair_without_a_score_on_either_side_is_left_out_and_is_no_tie() -> None:
    found = compared([0, 0, 1, 2], [1, NAN, 0, 1], [0, 0, NAN, 0])
    assert (found.pairs, found.prompts, found.wins, found.ties) == (2, 2, 1.0, 0.0)
    assert paired(np.array([0]), np.array([NAN]), np.array([1.0])) is None


def test_what_rounding_explains_is_a_tie_at_any_scale() -> None:
    for scale in (1e-6, 1.0, 1e6):
        a = scale * np.array([1.0, 1.0, 1e-9, 2.0])
        b = scale * np.array([1.0 + 1e-6, 1.01, 2e-9, 1.0])
        assert outcomes(a, b).tolist() == [0, -1, 0, 1]


def test_the_width_of_ties_is_an_option() -> None:
    a, b = np.array([1.0, 1.0, 1.0]), np.array([1.5, 1.6, 0.2])
    assert outcomes(a, b, 0.5).tolist() == [0, -1, 1]
    found = compared([0, 1, 2], a.tolist(), b.tolist(), tie_within=0.5)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(-0.3 / 3)  # a tie keeps its difference


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_verdicts_give_a_win_rate_and_no_difference() -> None:
    found = judged(np.array([0, 0, 1, 1]), np.array([1.0, 0.0, -1.0, NAN]))
    assert found is not None
    assert (found.wins, found.ties, found.losses, found.pairs) == (0.25, 0.25, 0.5, 3)
    assert (found.a, found.b, found.difference) == (None, None, None)
    assert judged(np.array([0]), np.array([NAN])) is None


def test_a_judge_who_sees_only_ties_gives_one_half_and_p_of_one() -> None:
    found = judged(np.arange(20), np.zeros(20))
    assert found is not None
    assert (found.win_rate.mean, found.p) == (0.5, 1.0)
    assert found.win_rate.low is not None and found.win_rate.high is not None
    assert found.win_rate.low < 0.5 < found.win_rate.high


# -- the test ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_p_of_few_prompts_is_that_of_every_assignment_of_signs(n: int) -> None:
    generator = np.random.default_rng(n)
    for _ in range(5):
        differences = generator.normal(0.4, 1, n)
        assert sign_flip(differences) == (pytest.approx(enumerated(differences)), None)
        coarse = generator.integers(-2, 3, n).astype(float)  # with zeros and equal sums
        assert sign_flip(coarse)[0] == pytest.approx(enumerated(coarse))


def test_p_of_many_prompts_is_near_that_of_every_assignment() -> None:
    """Five standard errors of the samples; the seed is fixed, so it holds or not once and for all."""
    generator = np.random.default_rng(0)
    for shift in (0.0, 0.3, 0.6):
        differences = generator.normal(shift, 1, EXACT + 2)
        signs = 1 - 2 * (np.arange(2 ** len(differences))[:, None] >> np.arange(len(differences)) & 1)
        exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
        p, flips = sign_flip(differences)
        assert flips == FLIPS
        assert abs(p - exact) <= 5 * np.sqrt(exact * (1 - exact) / FLIPS) + 1 / FLIPS


def test_p_is_never_below_what_the_samples_resolve_and_is_the_same_each_time() -> None:
    differences = np.full(60, 1.0)
    assert sign_flip(differences) == (1 / (FLIPS + 1), FLIPS) == sign_flip(differences)


def test_prompts_without_a_difference_change_no_p() -> None:
    differences = np.array([0.5, -0.2, 0.9, 0.4])
    assert sign_flip(np.concatenate((differences, np.zeros(40)))) == sign_flip(differences)
    assert sign_flip(np.zeros(3)) == (1.0, None)


@pytest.mark.parametrize(("n", "times"), [(10, 2000), (24, 400)])
def test_false_alarms_are_as_frequent_as_p_says(n: int, times: int) -> None:
    """Under a symmetric null p <= 0.05 comes in 5 % of cases: 10 prompts exactly, 24 by draws; within 5 standard errors
    (a chance of 1e-6 to fail for other seeds), less the steps of an exact p."""
    generator = np.random.default_rng(n)
    alarms = np.mean([sign_flip(generator.standard_t(3, n))[0] <= 0.05 for _ in range(times)])
    assert abs(alarms - 0.05) <= 5 * np.sqrt(0.05 * 0.95 / times) + 2 / 2**n


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_too_few_prompts_for_p_below_5_percent_are_too_few_for_an_interval() -> None:
    unanimous = [compared(list(range(n)), [1.0 + i for i in range(n)], [0.0] * n) for n in (FEWEST - 1, FEWEST)]
    assert [found.p > 0.05 for found in unanimous] == [True, False]
    assert [found.win_rate.low is None for found in unanimous] == [True, False]
    assert unanimous[1].win_rate.low is not None
    assert unanimous[1].win_rate.low > 0.5


def test_wins_on_every_prompt_leave_room_for_a_loss_unseen() -> None:
    for n in (6, 48, 1000):
        found = estimate(np.ones(n), share=True)
        assert found.low is not None
        assert (found.mean, found.high) == (1.0, 1.0)
        assert found.low**n == pytest.approx(0.025)  # a lower rate would show n wins in a row less often than that
    worst = estimate(np.zeros(48), share=True)
    assert worst.high is not None
    assert (1 - worst.high) ** 48 == pytest.approx(0.025)


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_they_claim() -> None:
    """A is better by 0.3, prompts differ, four pairs each. 400 trials: 95 % less what the percentile bootstrap lacks at
    40 prompts (about 1 %), and less 5 standard errors of 1.1 %."""
    generator = np.random.default_rng(7)
    prompts, k, times = 40, 4, 400
    groups = np.repeat(np.arange(prompts), k)
    truth = np.mean([win_probability(lead) for lead in np.random.default_rng(8).normal(0.3, 0.5, 20000)])
    held = np.zeros(2)
    for _ in range(times):
        lead = np.repeat(generator.normal(0.3, 0.5, prompts), k)
        difficulty = np.repeat(generator.normal(0, 3, prompts), k)
        a, b = difficulty + lead + generator.normal(size=len(lead)), difficulty + generator.normal(size=len(lead))
        found = paired(groups, a, b)
        assert found is not None and found.difference is not None
        for i, (interval, true) in enumerate(((found.difference, 0.3), (found.win_rate, truth))):
            assert interval.low is not None and interval.high is not None
            held[i] += interval.low <= true <= interval.high
    assert (held / times >= 0.94 - 5 * 0.011).all()
    assert (held / times < 1).all()


def win_probability(lead: float) -> float:
    """That A's score is above B's where both have unit noise and A leads by so much."""
    return 0.5 * (1 + erf(lead / 2))
