"""The whole loop, from the plan to the fitted model, against laws that are known in closed form.

Every prompt is the same label, so that a round's winners are independent generates from one law. Bounds are 5.3
standard
errors of the compounded sampling error (1e-7 a comparison) and an allowance for its curvature, of order 1/winners.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from tests.runs import tiny
from tools.closed_forms import (
    best_of_k_rounds,
    regularised_target,
    rounds_variance,
    temperature_law,
)

pytestmark = pytest.mark.slow

Floats = npt.NDArray[np.float64]
P = np.array([0.35, 0.3, 0.2, 0.1, 0.05])
R = np.array([0.0, 1.0, 1.0, 2.0, 3.0])
WIDTH = 5.3


def fitted(root: Path, prompts: int, rounds: int, k: int, p: Floats = P, r: Floats = R, **changes: Any) -> list[Floats]:
    """The policy of every round, the start first."""

    def reward(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
        return [float(r[answer]) for answer in completions]

    policy = {"family": "tabular", "logits": [np.log(p).tolist()], **changes.pop("policy", {})}
    sampling = {"num_generations": k, "chunk_size": 1000, **changes.pop("sampling", {})}
    settings = {"num_rounds": rounds, "prompts_per_round": prompts, "evaluation": {"num_prompts": 0}}
    config = tiny.config(root, **settings, policy=policy, sampling=sampling, **changes)
    run(config, PythonObjects(train=lambda: pa.table({"prompt": [0] * prompts}), rewards=[reward]))
    paths = [root / f"round-{number:04d}/model/policy.json" for number in range(rounds + 1)]
    rows = [json.loads(path.read_text())["log_p"][0] for path in paths]
    return [np.exp([-np.inf if value is None else value for value in row]) for row in rows]


def at_most(p: Floats) -> Floats:
    """The mass of each distinct reward and all below it, but for the highest."""
    return np.array([p[value >= R].sum() for value in np.unique(R)[:-1]])


@pytest.mark.parametrize(("k", "rounds"), [(2, 3), (4, 1), (3, 2)])
def test_rounds_of_best_of_k_are_one_best_of_k_to_their_power(tmp_path: Path, k: int, rounds: int) -> None:
    winners = 3000
    last = fitted(tmp_path / "run", winners, rounds, k)[-1]
    error = at_most(last) - at_most(best_of_k_rounds(P, R, k, rounds))
    allowed = WIDTH * np.sqrt(rounds_variance(at_most(P), k, rounds, winners)) + 50 / winners
    assert (np.abs(error) <= allowed).all(), (error, allowed)
    assert np.abs(at_most(last) - at_most(best_of_k_rounds(P, R, k, rounds + 1))).max() > allowed.max()


def test_inside_a_tie_the_shares_stay_as_they_were(tmp_path: Path) -> None:
    winners = 3000
    last = fitted(tmp_path / "run", winners, 2, 2)[-1]
    share, tied = P[1] / (P[1] + P[2]), winners * best_of_k_rounds(P, R, 2, 2)[1:3].sum()
    allowed = WIDTH * np.sqrt(2 * share * (1 - share) / tied) + 50 / winners
    assert abs(last[1] / (last[1] + last[2]) - share) <= allowed


def test_the_random_control_stays_where_it_was(tmp_path: Path) -> None:
    winners, rounds = 3000, 3
    last = fitted(tmp_path / "run", winners, rounds, 4, selection={"rule": "random"})[-1]
    assert (np.abs(last - P) <= WIDTH * np.sqrt(rounds * P * (1 - P) / winners)).all()


def test_sampling_below_temperature_one_collapses_at_the_predicted_rate_without_any_reward(tmp_path: Path) -> None:
    winners, rounds, temperature = 6000, 2, 0.7
    last = fitted(tmp_path / "run", winners, rounds, 1, sampling={"temperature": temperature})[-1]
    law = temperature_law(P, temperature, rounds)
    variance = np.zeros(len(P))
    for t in range(1, rounds + 1):
        q = temperature_law(P, temperature, t)
        power = temperature ** -(rounds - t)
        slope = power * (np.diag(law) - np.outer(law, law)) / q
        variance += np.diag(slope @ (np.diag(q) - np.outer(q, q)) @ slope.T) / winners
    assert (np.abs(last - law) <= WIDTH * np.sqrt(variance) + 20 / winners).all()
    assert np.abs(last - P).max() > 0.1


def test_kl_regularised_ranking_settles_at_its_fixed_point_when_steps_are_damped(tmp_path: Path) -> None:
    """Within 0.46·step of it, and the noise of a walk that is generated back by `step` a round."""
    start, r, beta, step, winners, rounds = np.full(4, 0.25), np.arange(4) / 3, 0.5, 0.1, 400, 40
    beta_and_step = {"selection": {"beta": beta}, "policy": {"step": step}}
    found = fitted(tmp_path / "run", winners, rounds, 4, p=start, r=r, **beta_and_step)
    target = regularised_target(start, r, beta)
    noise = step / np.sqrt(1 - (1 - step) ** 2) * np.sqrt(0.25 / winners)
    for p in found[-10:]:
        assert np.abs(p - target).max() <= 0.46 * step + WIDTH * noise
    assert np.abs(start - target).max() > 0.46 * step + WIDTH * noise
