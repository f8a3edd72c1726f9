"""What a regression on ratings is worth, against numbers worked out by hand and by numpy."""

from __future__ import annotations

import numpy as np
import pytest

from raftune.reward_models.metrics import (
    correlation,
    deciles,
    explained,
    pair_accuracy,
    pointwise_report,
    ranks,
    verdict,
)

RATINGS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 3.0, 3.0, 1.0, 5.0, 4.0, 2.0, 2.0])


def test_predicting_the_mean_explains_nothing_and_the_rating_itself_everything() -> None:
    prompts = np.arange(len(RATINGS))
    mean = explained(RATINGS, np.full(len(RATINGS), 3.0), 3.0, prompts)
    exact = explained(RATINGS, RATINGS, 3.0, prompts)
    assert mean is not None and (mean["mean"], mean["low"], mean["high"]) == (0.0, 0.0, 0.0)
    assert exact is not None and exact["low"] == 1.0


def test_prompts_whose_rating_is_the_mean_itself_count_against_the_model() -> None:
    predicted = np.where(RATINGS == 3, 9.0, RATINGS)
    found = explained(RATINGS, predicted, 3.0, np.arange(len(RATINGS)))
    assert found is not None and found["mean"] == pytest.approx(1 - 108 / ((RATINGS - 3) ** 2).sum())


def test_nothing_can_be_explained_where_nothing_differs() -> None:
    flat = np.full(12, 3.0)
    report = pointwise_report(np.zeros(12), flat, np.ones(12), np.arange(12), 3.0, 1.0)
    assert report["r2"] is None and report["pearson"] is None
    assert verdict("pointwise", report) == (False, "cannot be judged: all held-out ratings are alike")


def test_ties_share_their_ranks() -> None:
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert correlation(ranks(RATINGS), ranks(RATINGS**3)) == pytest.approx(1.0)
    assert correlation(RATINGS, np.ones(12)) is None


def test_pairs_are_compared_within_their_prompt_only() -> None:
    prompts = np.array([0, 0, 0, 1, 1, 2])
    ratings = np.array([1.0, 2.0, 2.0, 5.0, 4.0, 9.0])
    predicted = np.array([0.0, 1.0, -1.0, 0.0, 1.0, -9.0])
    found = pair_accuracy(predicted, ratings, prompts)
    assert found is not None and found["n"] == 2 and found["mean"] == pytest.approx((0.5 + 0.0) / 2)
    assert pair_accuracy(predicted, ratings, np.arange(6)) is None


def test_deciles_hold_all_rows_from_the_lowest_prediction_to_the_highest() -> None:
    predicted = np.arange(25.0)
    found = deciles(predicted[::-1].copy(), predicted[::-1].copy() + 1)
    assert sum(one["rows"] for one in found["bins"]) == 25 and len(found["bins"]) == 10
    assert [one["predicted"] for one in found["bins"]] == sorted(one["predicted"] for one in found["bins"])
    assert found["expected_error"] == pytest.approx(1.0)


def test_scores_are_reported_in_the_ratings_own_unit() -> None:
    standard = (RATINGS - 3.0) / 2.0
    report = pointwise_report(standard, RATINGS, np.ones(12), np.arange(12), 3.0, 2.0)
    assert report["mse"]["mean"] == 0.0 and report["mse_of_mean"]["mean"] == pytest.approx(((RATINGS - 3) ** 2).mean())
    assert verdict("pointwise", report)[0]
