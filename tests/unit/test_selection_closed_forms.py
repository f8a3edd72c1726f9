"""Selection, run on the samples of categorical policies, has the laws that mathematics says it has.

Where it can be, a claim is checked over *all* V**K sequences of samples, each weighed with its probability: then it
holds up to rounding. Where draws are random, the seed is fixed and the tolerance is five standard errors or more: a
false alarm of at most 6e-7 a comparison. The closed forms are checked by brute force in tools/test_closed_forms.py.
"""

from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any

import numpy as np
import pytest

from raftune.config.selection import TopFraction
from raftune.evaluation.bootstrap import best_of_k_estimates
from raftune.selection import Candidates, Verdicts, select, without_candidates
from tests.unit.selection_tables import selection_config
from tools import closed_forms as exact

P = np.array([0.1, 0.35, 0.2, 0.05, 0.3])
R = np.array([1.0, 0.0, 1.0, 2.5, 0.0])


@dataclass(frozen=True)
class SampledGroups:
    """X groups of K answers (X, K), their scores, and the probability of each group (X,)."""

    answers: np.ndarray
    scores: np.ndarray
    chance: np.ndarray

    @property
    def candidates(self) -> Candidates:
        group, k = np.indices(self.answers.shape)
        return Candidates(
            group.ravel(),
            k.ravel().astype(np.int32),
            self.scores.ravel(),
            np.ones(self.answers.size, np.int64),
            self.answers.ravel().astype(np.uint64),
        )

    def verdicts(self, seed: int = 0, **fields: Any) -> Verdicts:
        # The laws are those of all prompts: also of one whose draws are all the same answer.
        return select(self.candidates, selection_config(**{"all_equal": "keep", **fields}), seed)

    def weights(self, seed: int = 0, **fields: Any) -> np.ndarray:
        """(X, K)"""
        return self.verdicts(seed, **fields).weight.reshape(self.answers.shape)

    def mass(self, weights: np.ndarray, size: int) -> np.ndarray:
        """(V,) the expected weight that falls on each answer."""
        return np.bincount(self.answers.ravel(), (self.chance[:, None] * weights).ravel(), size)

    def law(self, size: int = 5, **fields: Any) -> np.ndarray:
        """(V,) the distribution to which fitting the weighted samples of all groups leads."""
        mass = self.mass(self.weights(**fields), size)
        return mass / mass.sum()


def all_outcomes(p: np.ndarray, r: np.ndarray, k: int) -> SampledGroups:
    answers = np.array(list(product(range(len(p)), repeat=k)))
    return SampledGroups(answers, r[answers], p[answers].prod(axis=1))


def random_samples(p: np.ndarray, r: np.ndarray, k: int, groups: int, seed: int) -> SampledGroups:
    answers = np.random.default_rng(seed).choice(len(p), size=(groups, k), p=p)
    return SampledGroups(answers, r[answers], np.full(groups, 1 / groups))


# -- 1 to 5: best of K and top m -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_1_the_best_of_k_samples_has_its_distribution(k: int) -> None:
    np.testing.assert_allclose(all_outcomes(P, R, k).law(), exact.best_of_k_law(P, R, k), atol=1e-14)


def test_1_breaking_ties_by_content_would_have_another_law() -> None:
    generated = all_outcomes(P, R, 3)
    by_content = SampledGroups(generated.answers, generated.scores + 1e-6 * generated.answers, generated.chance)
    assert np.abs(by_content.law() - exact.best_of_k_law(P, R, 3)).max() > 0.05


@pytest.mark.parametrize(("k", "m"), [(3, 1), (4, 2), (5, 2), (5, 3), (4, 4)])
def test_2_the_m_best_of_k_samples_have_their_marginal_distribution(k: int, m: int) -> None:
    generated = all_outcomes(P, R, k)
    np.testing.assert_allclose(generated.law(rule="top_m", m=m), exact.top_m_law(P, R, k, m), atol=1e-14)
    assert (generated.weights(rule="top_m", m=m).sum(axis=1) == m).all()


def test_2_winners_of_one_group_are_not_independent() -> None:
    generated = all_outcomes(P, R, 4)
    weights = generated.weights(rule="top_m", m=2)
    best = exact.top_m_law(P, R, 4, 2)[3]
    both = generated.chance @ ((weights * (generated.answers == 3)).sum(axis=1) == 2)
    assert both > 1.3 * best**2


@pytest.mark.parametrize("k", [1, 2, 5])
def test_3_the_expected_score_of_the_kept_is_the_expected_best(k: int) -> None:
    generated = all_outcomes(P, R, k)
    mean = generated.chance @ (generated.weights() * generated.scores).sum(axis=1)
    assert mean == pytest.approx(exact.expected_best(P, R, k), abs=1e-13)
    assert mean <= exact.expected_best_bound(P, R, k) + 1e-12


def test_4_the_selected_diverge_less_than_the_bound_and_win_no_more_than_k_of_k_plus_1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        p, r = rng.dirichlet(np.ones(4)), rng.integers(0, 3, 4).astype(float)
        for k in (1, 2, 4):
            q = all_outcomes(p, r, k).law(4)
            assert exact.kl(q, p) <= exact.best_of_k_kl_bound(p, r, k) + 1e-12
            assert exact.win_rate(q, p, r) <= k / (k + 1) + 1e-12


def test_5_rounds_of_selection_with_an_exact_fit_are_one_selection_among_more() -> None:
    law = P
    for _ in range(3):
        law = all_outcomes(law, R, 3).law()
    np.testing.assert_allclose(law, exact.best_of_k_rounds(P, R, 3, 3), atol=1e-13)


def test_5_the_error_of_finitely_many_winners_compounds_over_rounds() -> None:
    k, rounds, winners, runs = 2, 3, 4000, 3000
    start = np.array([0.88, 0.12])
    rng, p = np.random.default_rng(0), np.tile(start, (runs, 1))
    for _ in range(rounds):
        best = np.stack([p[:, 0] ** k, 1 - p[:, 0] ** k], axis=1)  # F is the mass of the worse answer
        p = rng.multinomial(winners, best) / winners
    final = exact.best_of_k_rounds(start, [0.0, 1.0], k, rounds)[0]
    variance = float(exact.rounds_variance(start[0], k, rounds, winners))
    # The variance of 3000 runs has a relative standard error of √(2/3000) = 2.6 %.
    assert p[:, 0].var() == pytest.approx(variance, rel=0.15)
    assert abs(p[:, 0].mean() - final) < 5 * np.sqrt(variance / runs) + 10 / winners
    assert 2 < np.sqrt(variance / (final * (1 - final) / winners)) < 3.5


# -- 6: what the best of fewer would have been -----------------------------------------------------------------------


def test_6_the_estimate_is_what_selection_keeps_of_every_subset() -> None:
    scores = np.array([0.5, 2.0, 0.5, -1.0, 3.0, 2.0, 0.0])
    for k in range(1, 8):
        subsets = np.array(list(combinations(range(7), k)))
        generated = SampledGroups(subsets, scores[subsets], np.full(len(subsets), 1 / len(subsets)))
        mean = generated.chance @ (generated.weights() * generated.scores).sum(axis=1)
        assert best_of_k_estimates(scores, [k])[0] == pytest.approx(mean, abs=1e-13)


def test_6_the_estimate_has_the_expectation_of_the_best_of_k() -> None:
    generated = all_outcomes(P, R, 5)
    for k in range(1, 6):
        mean = generated.chance @ best_of_k_estimates(generated.scores, [k])[:, 0]
        assert mean == pytest.approx(exact.expected_best(P, R, k), abs=1e-13)
    good = (R > 0).astype(float)
    binary = all_outcomes(P, good, 5)
    passes = [1 - comb(5 - int(n), 2) / comb(5, 2) for n in binary.scores.sum(axis=1)]
    np.testing.assert_allclose(best_of_k_estimates(binary.scores, [2])[:, 0], passes, atol=1e-14)


# -- 7: the normalisation of the loss is the objective ---------------------------------------------------------------

GOOD = np.array([True, False, True, False, False])
S = P[GOOD].sum()
LOG_S, LOG_FAIL = exact.log_mass_gradient(P, GOOD), exact.log_mass_gradient(P, ~GOOD)
K = 4


def gradient(generated: SampledGroups, weights: np.ndarray) -> np.ndarray:
    """(V,) the expectation over prompts of Σ_k weight · ∇ log p(answer), in the logits of P."""
    mass = generated.mass(weights, len(P))
    return mass - mass.sum() * P


def per_prompt(weights: np.ndarray) -> np.ndarray:
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize("cap", [1, None])
def test_7_positives_normalised_per_prompt_climb_a_sum_of_pass_at_k(cap: int | None) -> None:
    generated = all_outcomes(P, GOOD.astype(float), K)
    weights = generated.weights(rule="threshold", threshold=1, max_per_prompt=cap)
    expected = (1 - (1 - S) ** K) * LOG_S
    np.testing.assert_allclose(gradient(generated, per_prompt(weights)), expected, atol=1e-14)
    # ∇ pass@k = k (1−s)^{k−1} ∇s, and ∇s = s ∇log s.
    np.testing.assert_allclose(sum((1 - S) ** (k - 1) for k in range(1, K + 1)) * S * LOG_S, expected, atol=1e-14)


def test_7_positives_divided_by_k_are_plain_policy_gradient() -> None:
    generated = all_outcomes(P, GOOD.astype(float), K)
    weights = generated.weights(rule="threshold", threshold=1)
    np.testing.assert_allclose(gradient(generated, weights / K), S * LOG_S, atol=1e-14)


def test_7_keeping_the_best_of_an_all_bad_prompt_wastes_one_sample() -> None:
    generated = all_outcomes(P, GOOD.astype(float), K)
    net = gradient(generated, generated.weights())
    all_bad = (1 - S) ** K * LOG_FAIL
    np.testing.assert_allclose(net, (1 - (1 - S) ** K) * LOG_S + all_bad, atol=1e-14)
    np.testing.assert_allclose(net, (1 - (1 - S) ** (K - 1)) * LOG_S, atol=1e-14)


def test_7_averaging_over_the_kept_prompts_loses_the_factor() -> None:
    generated = all_outcomes(P, GOOD.astype(float), K)
    weights = generated.weights(rule="threshold", threshold=1, max_per_prompt=1)
    kept = generated.chance @ weights.any(axis=1)
    np.testing.assert_allclose(gradient(generated, weights) / kept, LOG_S, atol=1e-14)


def test_7_positives_pooled_over_prompts_weigh_easy_prompts_more() -> None:
    easy, hard = all_outcomes(P, GOOD.astype(float), K), all_outcomes(P, (~GOOD).astype(float), K)
    fields: dict[str, Any] = {"rule": "threshold", "threshold": 1}
    pooled = gradient(easy, easy.weights(**fields)) + gradient(hard, hard.weights(**fields))
    positives = sum(generated.chance @ generated.weights(**fields).sum(axis=1) for generated in (easy, hard))
    np.testing.assert_allclose(pooled / positives, (S * LOG_S + (1 - S) * LOG_FAIL) / (S + (1 - S)), atol=1e-14)


# -- 8 to 10: thresholds, a penalty, temperature ---------------------------------------------------------------------


def test_8_a_fixed_threshold_restricts_the_policy_and_is_idempotent() -> None:
    fields: dict[str, Any] = {"rule": "threshold", "threshold": 1}
    once = all_outcomes(P, R, 3).law(**fields)
    np.testing.assert_allclose(once, exact.threshold_law(P, R, 1), atol=1e-14)
    np.testing.assert_allclose(all_outcomes(once, R, 3).law(**fields), once, atol=1e-14)
    assert exact.kl(once, P) == pytest.approx(-np.log(P[R >= 1].sum()), abs=1e-13)


def test_8_a_threshold_that_none_reaches_leaves_every_prompt_without_kept_samples() -> None:
    generated = all_outcomes(P, R, 2)
    verdicts = generated.verdicts(rule="threshold", threshold=3)
    assert without_candidates(generated.candidates, verdicts) == dict.fromkeys(range(25), "below the threshold")


START, REWARD, BETA = np.full(4, 0.25), np.array([0, 1 / 3, 2 / 3, 1]), 0.5


def regularised_round(p: np.ndarray) -> np.ndarray:
    """The exact fit to the best of 4 by r − β·log(p/p₀), rounded so that ties of mathematics are ties in floats."""
    return all_outcomes(p, np.round(exact.regularised_scores(p, START, REWARD, BETA), 9), 4).law(4)


def test_9_the_regularised_target_is_a_fixed_point_of_selection() -> None:
    target = exact.regularised_target(START, REWARD, BETA)
    np.testing.assert_allclose(regularised_round(target), target, atol=1e-13)


def test_9_without_the_tolerance_rounding_breaks_the_ties_by_content() -> None:
    start, reward = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.7, 0.4, 0.9])
    target = exact.regularised_target(start, reward, 0.3)
    untied = all_outcomes(target, exact.regularised_scores(target, start, reward, 0.3), 4).law(4)
    assert np.abs(untied - target).max() > 0.05


@pytest.mark.parametrize("step", [0.2, 0.1, 0.05])
def test_9_damped_rounds_settle_around_the_target(step: float) -> None:
    p, target, farthest = START, exact.regularised_target(START, REWARD, BETA), 0.0
    for turn in range(300):
        p = (1 - step) * p + step * regularised_round(p)
        farthest = max(farthest, np.abs(p - target).max()) if turn >= 100 else 0.0
    assert farthest < 0.5 * step


def test_9_full_rounds_swing() -> None:
    p, path = START, []
    for _ in range(60):
        p = regularised_round(p)
        path.append(p)
    assert np.ptp(path, axis=0).max() > 0.7


def test_10_sampling_at_a_temperature_sharpens_without_any_selection() -> None:
    law = P
    for _ in range(4):
        law = all_outcomes(exact.temperature_law(law, 0.8), np.zeros(5), 1).law()
    np.testing.assert_allclose(law, exact.temperature_law(P, 0.8, 4), atol=1e-13)
    assert law.max() > 0.45 > P.max()
    unchanged = all_outcomes(exact.temperature_law(P, 1.0), np.zeros(5), 1).law()
    np.testing.assert_allclose(unchanged, P, atol=1e-14)


# -- 11: ranking all prompts together --------------------------------------------------------------------------------


def test_11_global_ranking_starves_hard_prompts_as_predicted() -> None:
    policies = np.array([[0.2, 0.3, 0.5], [0.5, 0.4, 0.1], [0.9, 0.1, 0.0]])
    values, n = np.array([0.0, 1.0, 2.0]), np.array([100000, 200000, 100000])
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.choice(values, size, p=p) for p, size in zip(policies, n, strict=True)])
    group = np.repeat(np.arange(3), n)
    k = np.concatenate([np.arange(size) for size in n]).astype(np.int32)
    unused = np.zeros(len(group), np.int64)
    table = Candidates(group, k, scores, unused, unused.astype(np.uint64))
    weight = select(table, TopFraction(keep_fraction=0.3), 1).weight
    assert weight.sum() == 120000
    # A share of 120,000 has a standard error of at most ½/√120000 = 0.0015, here from draws and from ties.
    shares = np.bincount(group, weight) / weight.sum()
    expected = exact.global_shares(policies, np.tile(values, (3, 1)), n, 0.3)
    np.testing.assert_allclose(shares, expected, atol=0.008)
    assert shares[2] < 0.05


@pytest.mark.slow
def test_11_ties_at_the_cut_do_not_exclude_later_prompts() -> None:
    # Two prompts with 0/1 rewards at .7 and .3, four draws each, 2 of 8 kept: with fair ties .717/.283 in expectation.
    chances = np.repeat([0.7, 0.3], 4)
    outcomes = np.array(list(product((0, 1), repeat=8)))
    chance = np.where(outcomes, chances, 1 - chances).prod(axis=1)
    shares = np.zeros(2)
    exact_share = 0.0
    for scores, weight in zip(outcomes, chance, strict=True):
        generated = SampledGroups(np.zeros((2, 4), np.int64), scores.reshape(2, 4).astype(float), np.ones(2))
        for seed in range(20):
            kept = generated.weights(seed, rule="top_fraction", keep_fraction=0.25).sum(axis=1)
            shares += weight * kept / 2 / 20
        exact_share += weight * _fair_share_of_first(scores)
    assert exact_share == pytest.approx(0.717, abs=5e-4)
    # Per outcome a share of the 2 places has a standard deviation of at most ½; the weights square-sum to 0.013.
    # So the standard error is at most ½·√(0.013/20) = 0.013; by flat index the share would be 0.97.
    assert chance @ chance < 0.013
    assert shares[0] == pytest.approx(exact_share, abs=0.065)


def _fair_share_of_first(scores: np.ndarray) -> float:
    pairs = [(a, b) for a, b in combinations(range(8), 2) if scores[a] + scores[b] == min(2, scores.sum())]
    return float(np.mean([(a < 4) + (b < 4) for a, b in pairs])) / 2


# -- 12, 13: invariance and allocation -------------------------------------------------------------------------------


def transformed(generated: SampledGroups) -> SampledGroups:
    """Each group's scores under a strictly increasing function of its own."""
    scale = 0.5 + np.arange(len(generated.scores))[:, None] % 7
    return SampledGroups(generated.answers, np.arctan(generated.scores * scale) - 5 * scale, generated.chance)


@pytest.mark.parametrize("fields", [{}, {"rule": "top_m", "m": 2}, {"all_equal": "skip"}, {"rule": "random"}])
def test_12_ranking_within_prompts_is_invariant_to_increasing_transformations(fields: dict[str, Any]) -> None:
    generated = random_samples(P, R, 4, 500, seed=3)
    np.testing.assert_array_equal(generated.weights(**fields), transformed(generated).weights(**fields))


def test_12_global_ranking_is_invariant_to_a_common_transformation_only() -> None:
    generated = random_samples(P, R, 4, 500, seed=4)
    fields: dict[str, Any] = {"rule": "top_fraction", "keep_fraction": 0.2}
    common = SampledGroups(generated.answers, np.exp(generated.scores), generated.chance)
    np.testing.assert_array_equal(generated.weights(**fields), common.weights(**fields))
    assert (generated.weights(**fields) != transformed(generated).weights(**fields)).any()


@pytest.mark.parametrize(
    "fields", [{"rule": "softmax", "temperature": 1}, {"rule": "threshold", "threshold": 1}, {"margin": 1}]
)
def test_12_softmax_threshold_and_margin_see_the_scale(fields: dict[str, Any]) -> None:
    generated = random_samples(P, R, 4, 500, seed=5)
    doubled = SampledGroups(generated.answers, 2 * generated.scores + 1, generated.chance)
    assert (generated.weights(**fields) != doubled.weights(**fields)).any()


def test_12_a_transformation_that_saturates_in_floats_makes_ties() -> None:
    scores = np.array([[40.0, 41.0]])
    generated = SampledGroups(np.array([[0, 1]]), scores, np.ones(1))
    saturated = SampledGroups(generated.answers, 1 / (1 + np.exp(-scores)), generated.chance)
    assert generated.weights().tolist() == [[0, 1]]
    assert saturated.weights().tolist() == [[1, 0]]


@pytest.mark.slow
def test_13_the_best_allocation_leaves_the_variance_it_promises() -> None:
    norms, acceptance, total, runs = np.array([1.0, 1.0, 6.0]), np.array([0.9, 0.5, 0.2]), 1500, 600

    def simulated(n: np.ndarray, seed: int) -> float:
        """The variance, summed over prompts, of the mean gradient over what the threshold accepts of n draws."""
        return sum(
            _variance_of_mean(g, s, int(size), runs, seed) for g, s, size in zip(norms, acceptance, n, strict=True)
        )

    best, equal = exact.allocation(norms, acceptance, total), np.full(3, total / 3)
    assert exact.allocation_value(norms, acceptance, best) == pytest.approx(
        (norms / np.sqrt(acceptance)).sum() ** 2 / total
    )
    # Relative standard error of a variance over 600 runs: √(2/600) = 5.8 %.
    for n in (best, equal):
        assert simulated(np.round(n), 0) == pytest.approx(exact.allocation_value(norms, acceptance, n), rel=0.3)
    assert simulated(np.round(best), 1) < 0.7 * simulated(equal, 2)


def _variance_of_mean(norm: float, acceptance: float, n: int, runs: int, seed: int) -> float:
    """Runs are groups of n candidates; gradients are normal with standard deviation `norm`, unrelated to the score."""
    rng = np.random.default_rng([seed, n])
    generated = SampledGroups(np.zeros((runs, n), np.int64), rng.random((runs, n)), np.ones(runs))
    accepted = generated.weights(rule="threshold", threshold=1 - acceptance)
    means = (accepted * rng.normal(0, norm, (runs, n))).sum(axis=1) / accepted.sum(axis=1)
    return float(means.var())
