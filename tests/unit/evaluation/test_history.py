from __future__ import annotations

from typing import Any

import pytest

from raftune.config import StopConfig
from raftune.errors import ConfigError
from raftune.evaluation.history import best_round, reason_to_stop


def rounds(*rewards: float, held_out: tuple[float, ...] = (), kl: float = 0.0) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = [{"reward": {"mean": reward}, "kl": {"mean": kl}} for reward in rewards]
    for metrics, value in zip(history, held_out, strict=False):
        metrics["held_out"] = {"mean": value}
        metrics["held_out/rewards/judge/mean"] = {"mean": value}
    return history


def test_the_best_round_is_the_earliest_of_equals() -> None:
    assert best_round(rounds(0.0, 2.0, 1.0, 2.0), "reward") == (1, 2.0)


def test_the_start_is_published_when_no_round_beats_it() -> None:
    assert best_round(rounds(1.0, 0.5, 0.9), "reward") == (0, 1.0)


def test_the_best_round_can_be_chosen_by_a_held_out_reward() -> None:
    assert best_round(rounds(0.0, 1.0, 2.0, held_out=(1.0, 3.0, 2.0)), "judge") == (1, 3.0)


def test_a_run_without_measurements_has_no_best_round() -> None:
    assert best_round([{}, {}], "reward") is None


def test_an_unknown_name_lists_the_rewards_there_are() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.best_by .*judge.*'juge'"):
        best_round(rounds(0.0, held_out=(1.0,)), "juge")


def test_patience_counts_rounds_since_the_last_new_best() -> None:
    stop = StopConfig(patience=2)
    assert reason_to_stop(rounds(0.0, 1.0, 0.5), stop, "reward") is None
    assert (
        reason_to_stop(rounds(0.0, 1.0, 0.5, 0.9), stop, "reward") == "no gain above 0 for 2 rounds (stop.patience = 2)"
    )


def test_a_gain_below_the_least_gain_does_not_count() -> None:
    assert reason_to_stop(rounds(0.0, 0.05, 0.09), StopConfig(patience=2, min_gain=0.1), "reward") is not None


def test_a_kl_above_its_budget_stops_the_run() -> None:
    assert "above stop.max_kl = 2" in (reason_to_stop(rounds(0.0, 1.0, kl=2.5), StopConfig(max_kl=2), "reward") or "")
    assert reason_to_stop(rounds(0.0, 1.0, kl=1.5), StopConfig(max_kl=2), "reward") is None


def test_a_held_out_reward_that_falls_while_the_trained_one_rises_stops_the_run() -> None:
    parting = rounds(0.0, 1.0, 2.0, 3.0, held_out=(1.0, 2.0, 1.5, 1.0))
    assert "for 2 rounds" in (reason_to_stop(parting, StopConfig(max_falls=2), "reward") or "")
    assert reason_to_stop(parting, StopConfig(max_falls=3), "reward") is None


def test_both_rewards_falling_together_raise_no_divergence_alarm() -> None:
    assert reason_to_stop(rounds(3.0, 2.0, 1.0, held_out=(3.0, 2.0, 1.0)), StopConfig(max_falls=1), "reward") is None
