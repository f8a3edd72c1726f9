"""The closed forms agree with brute force over all outcomes, and with one another."""

from itertools import product

import numpy as np
import pytest

from tools import closed_forms as exact

P = np.array([0.05, 0.3, 0.0, 0.25, 0.15, 0.25])
R = np.array([2.0, 0.0, 9.0, 1.0, 2.0, 0.0])


def outcomes(p: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All V**k sequences of k samples, and their probabilities."""
    draws = np.array(list(product(range(len(p)), repeat=k)))
    return draws, p[draws].prod(axis=1)


def random_policy(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = int(rng.integers(2, 8))
    return rng.dirichlet(np.full(size, 0.5)), rng.integers(0, 4, size).astype(float)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_best_of_k_is_the_law_of_the_first_maximum(k: int) -> None:
    draws, chance = outcomes(P, k)
    best = draws[np.arange(len(draws)), R[draws].argmax(axis=1)]
    np.testing.assert_allclose(exact.best_of_k_law(P, R, k), np.bincount(best, chance, len(P)), atol=1e-14)
    assert exact.expected_best(P, R, k) == pytest.approx(chance @ R[draws].max(axis=1), abs=1e-13)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (4, 1), (4, 2), (5, 3), (5, 5)])
def test_top_m_is_the_law_of_a_random_one_of_the_m_best(k: int, m: int) -> None:
    draws, chance = outcomes(P, k)
    order = np.argsort(-R[draws], axis=1, kind="stable")[:, :m]
    law = np.bincount(np.take_along_axis(draws, order, axis=1).ravel(), np.repeat(chance / m, m), len(P))
    np.testing.assert_allclose(exact.top_m_law(P, R, k, m), law, atol=1e-14)


def test_top_1_is_best_of_k_and_all_of_k_is_the_policy() -> None:
    np.testing.assert_allclose(exact.top_m_law(P, R, 6, 1), exact.best_of_k_law(P, R, 6), atol=1e-14)
    np.testing.assert_allclose(exact.top_m_law(P, R, 6, 6), P, atol=1e-14)


def test_categories_that_are_never_sampled_stay_so() -> None:
    for law in (exact.best_of_k_law(P, R, 4), exact.top_m_law(P, R, 4, 2), exact.threshold_law(P, R, 1)):
        assert law[2] == 0
        assert law.sum() == pytest.approx(1, abs=1e-15)


def test_the_law_survives_a_huge_k_and_tiny_masses() -> None:
    p, r = np.array([1 - 1e-12, 1e-12]), np.array([0.0, 1.0])
    assert exact.best_of_k_law(p, r, 10)[1] == pytest.approx(1e-11, rel=1e-9)
    assert exact.best_of_k_law(p, r, 8**10)[1] == pytest.approx(-np.expm1(8**10 * np.log1p(-1e-12)), rel=1e-6)
    tiny = exact.best_of_k_law([1e-300, 1.0], [0.0, 1.0], 100)
    np.testing.assert_allclose(tiny, [0, 1])


def test_rounds_of_best_of_k_compose() -> None:
    law = P
    for _ in range(3):
        law = exact.best_of_k_law(law, R, 3)
    np.testing.assert_allclose(law, exact.best_of_k_rounds(P, R, 3, 3), atol=1e-13)
    twice = exact.top_m_law(exact.top_m_law(P, R, 4, 2), R, 4, 2)
    assert np.abs(twice - exact.top_m_law(P, R, 16, 4)).max() > 0.01  # and top m does not


def test_iterating_the_map_neither_overflows_nor_loses_mass() -> None:
    law = 1.0000001 * P
    for _ in range(200):
        law = exact.best_of_k_law(law, R, 8)
    np.testing.assert_allclose(law, exact.threshold_law(P, R, 2), atol=1e-12)


def test_the_divergence_stays_below_its_bound_and_the_best_below_its_own() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p, r = random_policy(rng)
        for k in (1, 2, 8, 64):
            q = exact.best_of_k_law(p, r, k)
            assert exact.kl(q, p) <= exact.best_of_k_kl_bound(p, r, k) + 1e-12
            assert exact.win_rate(q, p, r) <= k / (k + 1) + 1e-12
            assert exact.expected_best(p, r, k) <= exact.expected_best_bound(p, r, k) + 1e-12
            assert exact.expected_best(p, r, k) == pytest.approx(q @ r, abs=1e-12)


def test_the_bounds_are_tight_where_they_should_be() -> None:
    p, r = np.full(2000, 1 / 2000), np.arange(2000.0)
    q = exact.best_of_k_law(p, r, 4)
    assert exact.kl(q, p) == pytest.approx(np.log(4) - 3 / 4, abs=1e-3)
    assert exact.win_rate(q, p, r) == pytest.approx(4 / 5, abs=1e-3)
    assert exact.expected_best_bound(P, R, 1) == pytest.approx(exact.expected_best(P, R, 1))
    assert exact.kl([0.5, 0.5], [1.0, 0.0]) == np.inf


def test_a_threshold_is_idempotent_with_the_divergence_of_its_rarity() -> None:
    once = exact.threshold_law(P, R, 1)
    np.testing.assert_array_equal(exact.threshold_law(once, R, 1), once)
    assert exact.kl(once, P) == pytest.approx(-np.log(0.45), abs=1e-14)
    with pytest.raises(ValueError, match="no completion of positive probability reaches the threshold 3"):
        exact.threshold_law(P, R, 3)


def test_temperature_sharpens_round_by_round() -> None:
    law = P
    for _ in range(3):
        law = law ** (1 / 0.8)
        law /= law.sum()
    np.testing.assert_allclose(exact.temperature_law(P, 0.8, 3), law, atol=1e-14)
    np.testing.assert_allclose(exact.temperature_law(P, 0.8, 60)[[1, 3]], [1, 0], atol=1e-12)


def test_the_regularised_target_ties_all_scores_and_is_a_fixed_point() -> None:
    start, r = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 1.0, 0.5, -1.0])
    target = exact.regularised_target(start, r, 0.5)
    assert np.ptp(exact.regularised_scores(target, start, r, 0.5)) < 1e-14
    np.testing.assert_allclose(exact.regularised_round(target, start, r, beta=0.5, k=4), target, atol=1e-14)
    assert np.abs(exact.regularised_round(start, start, r, beta=0.5, k=4) - start).max() > 0.1


def test_scores_within_the_tolerance_are_one_level() -> None:
    p, r = np.array([0.5, 0.25, 0.25]), np.array([0.3, 0.1 + 0.2, 0.0])
    np.testing.assert_allclose(exact.best_of_k_law(p, r, 2, tolerance=1e-9)[:2], [0.625, 0.3125], atol=1e-14)
    assert exact.best_of_k_law(p, r, 2)[1] == pytest.approx(0.4375)  # 0.1 + 0.2 exceeds 0.3 in floats


def test_global_shares_split_the_cut_alike_for_all_prompts() -> None:
    p, r = np.array([[0.9, 0.1], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    # Of 1 and 3 parts generated, 0.025 + 0.375 score 1: a fifth of all is half of them.
    np.testing.assert_allclose(exact.global_shares(p, r, [1, 3], 0.2), [1 / 16, 15 / 16], atol=1e-14)
    # Of the 0.6 that score 0, a share ρ = 1/6 fills a half.
    np.testing.assert_allclose(
        exact.global_shares(p, r, [1, 3], 0.5), np.array([0.025 + 0.225 / 6, 0.375 + 0.375 / 6]) / 0.5, atol=1e-14
    )
    np.testing.assert_allclose(exact.global_shares(p, r, [1, 3], 1.0), [0.25, 0.75], atol=1e-14)


def test_the_gradient_of_a_log_mass_is_its_finite_difference() -> None:
    logits, members = np.array([0.3, -1.0, 0.8, 0.0]), np.array([True, False, False, True])

    def log_mass(x: np.ndarray) -> float:
        return float(np.log((np.exp(x) / np.exp(x).sum())[members].sum()))

    numeric = [(log_mass(logits + h) - log_mass(logits - h)) / 2e-6 for h in 1e-6 * np.eye(4)]
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(exact.log_mass_gradient(p, members), numeric, atol=1e-9)


def test_no_other_allocation_leaves_less_variance() -> None:
    g, s = np.array([1.0, 5.0, 0.5, 2.0]), np.array([0.9, 0.1, 0.3, 0.5])
    best = exact.allocation(g, s, 100)
    value = exact.allocation_value(g, s, best)
    assert best.sum() == pytest.approx(100)
    assert value == pytest.approx((g / np.sqrt(s)).sum() ** 2 / 100)
    rng = np.random.default_rng(0)
    assert all(exact.allocation_value(g, s, 100 * rng.dirichlet(np.ones(4))) >= value for _ in range(1000))
    assert exact.allocation_value(g, s, np.full(4, 25.0)) > 1.3 * value


def test_prompts_that_accept_nothing_have_no_best_allocation() -> None:
    with pytest.raises(ValueError, match="acceptance rate of 0"):
        exact.allocation([1.0, 1.0], [0.5, 0.0], 10)


@pytest.mark.parametrize(
    ("p", "r"), [([0.5, 0.5], [1.0]), ([0.5, -0.5], [1.0, 2.0]), ([0.0, 0.0], [1.0, 2.0]), ([0.5, 0.5], [1.0, np.nan])]
)
def test_what_is_no_policy_is_refused(p: list[float], r: list[float]) -> None:
    with pytest.raises(ValueError, match=r"p (and r )?must be"):
        exact.best_of_k_law(p, r, 2)
