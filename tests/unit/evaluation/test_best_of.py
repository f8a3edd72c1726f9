"""The best-of-k estimator is the average over all subsets, unbiased, and pass@k for zeros and ones."""

from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from raftune.evaluation.bootstrap import best_of_k_estimates


def test_the_estimate_is_the_mean_maximum_over_all_subsets() -> None:
    scores = np.array([0.3, -2.0, 0.3, 5.0, 1.25, -2.0])
    expected = [np.mean([max(subset) for subset in combinations(scores, k)]) for k in range(1, 7)]
    np.testing.assert_allclose(best_of_k_estimates(scores, range(1, 7)), expected, rtol=1e-13)


def test_the_estimate_is_unbiased() -> None:
    p, r, n = np.array([0.5, 0.2, 0.3]), np.array([1.0, 4.0, -1.0]), 5
    outcomes = np.array(list(product(range(3), repeat=n)))
    chance = p[outcomes].prod(axis=1)
    for k in range(1, n + 1):
        draws = np.array(list(product(range(3), repeat=k)))
        exact = p[draws].prod(axis=1) @ r[draws].max(axis=1)
        assert chance @ best_of_k_estimates(r[outcomes], [k])[:, 0] == pytest.approx(exact, abs=1e-12)


def test_one_is_the_mean_and_n_the_maximum() -> None:
    scores = np.random.default_rng(0).normal(size=(7, 40))
    estimates = best_of_k_estimates(scores, [1, 40])
    np.testing.assert_allclose(estimates, np.stack([scores.mean(axis=1), scores.max(axis=1)], axis=1), rtol=1e-12)


def test_pass_at_k_is_the_chance_that_not_all_are_failures() -> None:
    for n, successes, k in product((1, 4, 9), (0, 1, 4, 9), (1, 3, 9)):
        if successes <= n and k <= n:
            estimate = best_of_k_estimates(np.repeat([0.0, 1.0], [n - successes, successes]), [k])[0]
            assert estimate == pytest.approx(1 - comb(n - successes, k) / comb(n, k), abs=1e-14)


def test_no_binomial_overflows_for_many_scores() -> None:
    estimates = best_of_k_estimates(np.arange(1, 20001), [1, 100, 10000, 20000])
    # The maximum of k of 1..n has mean k(n+1)/(k+1).
    np.testing.assert_allclose(estimates, [k * 20001 / (k + 1) for k in (1, 100, 10000, 20000)], rtol=1e-9)


@pytest.mark.parametrize("ks", [[0], [1, 5], [-1]])
def test_a_k_beyond_the_scores_at_hand_is_refused(ks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"ks must lie in 1\.\.4, the number of scores"):
        best_of_k_estimates([1.0, 2.0, 3.0, 4.0], ks)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_failed_score_is_refused_and_not_left_out(bad: float) -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        best_of_k_estimates([1.0, bad], [1])
