"""Accuracy, calibration and length on held-out pairs, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from raftune.reward_models.metrics import (
    better_than_length,
    calibration,
    length_report,
    pairwise_report,
    right,
    verdict,
)


def report(margins: list[float], lengths: list[tuple[int, int]] | None = None, prompts: list[int] | None = None):  # type: ignore[no-untyped-def]
    n = len(margins)
    scores = np.stack([np.array(margins), np.zeros(n)], axis=1)
    sizes = np.array(lengths or [(10, 10)] * n, dtype=np.float64)
    return pairwise_report(scores, sizes, np.array(prompts or range(n)))


def test_a_tie_is_half_right() -> None:
    assert right(np.array([2.0, -0.1, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_accuracy_is_the_mean_over_prompts_of_their_pairs() -> None:
    found = report([1, 1, 1, -1], prompts=[0, 0, 0, 1])["accuracy"]
    assert found["mean"] == 0.5 and found["n"] == 2


def test_the_log_loss_is_that_of_bradley_and_terry() -> None:
    expected = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2
    assert report([2, -1])["log_loss"]["mean"] == pytest.approx(expected)


def test_calibration_sorts_pairs_by_how_sure_the_model_is_whichever_it_prefers() -> None:
    margin = math.log(0.9 / 0.1)  # a confidence of 0.9
    found = calibration(np.array([margin + 1e-9] * 3 + [-margin - 1e-9]))
    filled = [one for one in found["bins"] if one["pairs"]]
    assert [(one["from"], one["to"], one["pairs"]) for one in filled] == [(0.9, 0.95, 4)]
    assert filled[0]["confidence"] == pytest.approx(0.9) and filled[0]["accuracy"] == 0.75
    assert found["expected_error"] == pytest.approx(0.15) and found["confidence"] == pytest.approx(0.9)


def test_a_model_whose_confidence_is_its_accuracy_is_calibrated() -> None:
    """20,000 outcomes generated with the model's own probabilities: the error's expectation is below 0.01, its spread
    near 0.001."""
    rng = np.random.default_rng(0)
    margins = np.abs(rng.normal(0, 2, 20_000))
    wins = rng.random(20_000) < 1 / (1 + np.exp(-margins))
    assert calibration(np.where(wins, margins, -margins))["expected_error"] < 0.02
    assert calibration(np.where(wins, margins, -margins) * 5)["expected_error"] > 0.1


def test_certainty_itself_falls_into_the_last_bin() -> None:
    assert calibration(np.array([1e6, -1e6, 0.0]))["bins"][-1]["pairs"] == 2


def test_accuracy_is_reported_by_how_much_longer_the_preferred_completion_is() -> None:
    lengths = [(1, 10), (8, 10), (10, 10), (10, 8), (10, 1)]
    bins = report([1, -1, 1, -1, 1], lengths)["length"]["bins"]
    assert [one["pairs"] for one in bins] == [1] * 5
    assert [one["accuracy"]["mean"] for one in bins] == [1, 0, 1, 0, 1]


def test_a_ruler_is_detected_in_either_direction() -> None:
    longer = np.array([[10.0, 5.0]] * 30 + [[5.0, 10.0]] * 5)
    prompts = np.arange(35)
    margins = longer[:, 0] - longer[:, 1]
    found = length_report(margins, longer, prompts)
    assert found["only_length"] and found["prefers_longer"] == 1.0
    assert found["longer_wins"]["mean"] == pytest.approx(30 / 35) and found["gain_over_length"]["mean"] == 0.0
    assert length_report(-margins, longer[:, ::-1], prompts)["only_length"]


def test_a_model_that_is_right_against_length_too_is_no_ruler() -> None:
    lengths = np.array([[10.0, 5.0]] * 20 + [[5.0, 10.0]] * 15)
    found = length_report(np.ones(35), lengths, np.arange(35))
    assert not found["only_length"] and found["gain_over_length"]["low"] > 0


def test_empty_completions_are_measured_too() -> None:
    found = length_report(np.array([1.0, 1.0]), np.zeros((2, 2)), np.arange(2))
    assert found["bins"][2]["pairs"] == 2


def test_the_interval_must_lie_above_a_coin() -> None:
    assert verdict("pairwise", report([1.0] * 30))[0]
    assert not verdict("pairwise", report([1.0, -1.0] * 15))[0]
    assert not verdict("pairwise", report([1.0] * 9))[0]


def test_a_verdict_says_that_the_longer_completion_wins_as_often() -> None:
    """Right in 30 of 35 pairs, as the rule is: better than a coin, and than a ruler not."""
    longer = np.array([[10.0, 5.0]] * 30 + [[5.0, 10.0]] * 5)
    found = pairwise_report(longer, longer, np.arange(35))
    better, words = verdict("pairwise", found)
    assert better and not better_than_length(found)
    assert "but not than the rule that the longer completion wins, over which it gains 0.000 [0.000, 0.000]" in words
    lengths = np.array([[10.0, 5.0]] * 20 + [[5.0, 10.0]] * 15)
    found = pairwise_report(np.array([[1.0, 0.0]] * 35), lengths, np.arange(35))
    assert better_than_length(found) and "longer" not in verdict("pairwise", found)[1]


@pytest.mark.parametrize("pairs", [1, 2, 4])
def test_so_few_pairs_have_a_number_and_no_interval(pairs: int) -> None:
    found = report([1.0] * pairs)
    assert found["accuracy"] == {"mean": 1.0, "low": None, "high": None, "n": pairs}
    assert f"1.000 (n = {pairs}, too few for an interval)" in verdict("pairwise", found)[1]
