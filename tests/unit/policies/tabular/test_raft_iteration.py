"""The tabular exercise: who is kept, the exact step that follows, and what is refused."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from raftune.policies.tabular.raft_iteration import raft_iteration
from tools.closed_forms import top_m_law

NAN, INF = float("nan"), float("inf")
LOGITS = np.array([[0.0, 1.0, -0.5], [2.0, 0.3, 0.3]])
TABLE = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, -3.0]])


def softmax(logits: np.ndarray) -> np.ndarray:
    raw = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raw / raw.sum(axis=1, keepdims=True)


def reward(prompt: int, answer: int) -> float:
    return float(TABLE[prompt, answer])


class Recorder:
    """A reward that keeps what it was asked."""

    def __init__(self, values: np.ndarray = TABLE) -> None:
        self.values = values
        self.asked: list[tuple[int, int]] = []

    def __call__(self, prompt: int, answer: int) -> float:
        self.asked.append((prompt, answer))
        return float(self.values[prompt, answer])


def expected_step(asked: list[tuple[int, int]], m: int, lr: float, by_reward: bool = False) -> np.ndarray:
    """lr times the gradient of the mean log-likelihood of the m best of each prompt, in a plain loop."""
    p, step = softmax(LOGITS), np.zeros_like(LOGITS)
    for prompt in range(2):
        answers = [answer for asker, answer in asked if asker == prompt]
        best = sorted(range(len(answers)), key=lambda k: (-TABLE[prompt, answers[k]], k))[:m]
        for k in best:
            weight = TABLE[prompt, answers[k]] if by_reward else 1.0
            step[prompt] += lr * weight * (np.eye(3)[answers[k]] - p[prompt]) / m / 2
    return step


@pytest.mark.parametrize("weighting", ["uniform", "reward"])
def test_the_step_is_the_gradient_of_the_mean_log_likelihood_of_what_was_kept(weighting: Any) -> None:
    for seed in range(20):
        asked = Recorder()
        result = raft_iteration(LOGITS, [0, 1], asked, 8, 0.25, 1.0, weighting=weighting, rng=seed)
        step = expected_step(asked.asked, 2, 1.0, by_reward=weighting == "reward")
        np.testing.assert_allclose(result["updated_logits"] - LOGITS, step, atol=1e-14)
        assert len(asked.asked) == 16
        assert result["n_selected"] == 4


@pytest.mark.slow
def test_the_expected_step_is_that_of_the_top_m_law() -> None:
    # Per entry the step has a standard deviation below ½·½ (a frequency's, halved by n_prompts): 0.25/√8000 = 0.0028.
    rng, n = np.random.default_rng(0), 8000
    steps = [raft_iteration(LOGITS, [0, 1], reward, 4, 0.5, 1.0, rng=rng)["updated_logits"] - LOGITS for _ in range(n)]
    p = softmax(LOGITS)
    exact = np.stack([top_m_law(p[x], TABLE[x], 4, 2) - p[x] for x in range(2)]) / 2
    np.testing.assert_allclose(np.mean(steps, axis=0), exact, atol=5 * 0.0028)
    assert np.abs(exact).max() > 0.1


@pytest.mark.slow
def test_a_constant_reward_moves_nothing_on_average() -> None:
    rng, n = np.random.default_rng(1), 8000
    steps = [
        raft_iteration(LOGITS, [0, 1], lambda *_: 1.0, 4, 0.25, 1.0, rng=rng)["updated_logits"] - LOGITS
        for _ in range(n)
    ]
    np.testing.assert_allclose(np.mean(steps, axis=0), 0, atol=5 * 0.0028)


def test_neither_the_shift_nor_the_scale_of_the_reward_matters() -> None:
    plain = raft_iteration(LOGITS, [0, 1], reward, lr=1.0, rng=5)
    moved = raft_iteration(LOGITS, [0, 1], lambda x, y: 7 * reward(x, y) - 100, lr=1.0, rng=5)
    np.testing.assert_array_equal(plain["updated_logits"], moved["updated_logits"])
    assert moved["mean_reward"] == pytest.approx(7 * plain["mean_reward"] - 100)


def test_samples_follow_the_softmax() -> None:
    asked = Recorder()
    raft_iteration(LOGITS, [0, 1], asked, n_candidates=40000, rng=2)
    # Standard error of a frequency at most ½/√40000 = 0.0025.
    generated = np.zeros((2, 3))
    np.add.at(generated, tuple(np.array(asked.asked).T), 1 / 40000)
    np.testing.assert_allclose(generated, softmax(LOGITS), atol=5 * 0.0025)


@pytest.mark.parametrize(
    ("n", "fraction", "m"), [(100, 0.29, 29), (8, 0.25, 2), (8, 0.01, 1), (5, 0.5, 2), (3, 1.0, 3)]
)
def test_the_number_kept_is_rounded_down_but_never_none(n: int, fraction: float, m: int) -> None:
    assert raft_iteration(LOGITS, [0, 1], reward, n, fraction, rng=0)["n_selected"] == 2 * m


def test_ties_go_to_the_earlier_sample() -> None:
    asked = Recorder(np.zeros((2, 3)))
    result = raft_iteration(LOGITS, [0, 1], asked, 4, 0.25, 1.0, rng=3)
    first = [asked.asked[0][1], asked.asked[4][1]]
    np.testing.assert_allclose(result["updated_logits"] - LOGITS, (np.eye(3)[first] - softmax(LOGITS)) / 2, atol=1e-14)


def test_means_are_over_the_kept_and_over_all_that_were_generated() -> None:
    asked = Recorder()
    result = raft_iteration(LOGITS, [0, 1], asked, 8, 0.25, rng=4)
    rewards = np.array([TABLE[pair] for pair in asked.asked]).reshape(2, 8)
    assert result["mean_reward"] == pytest.approx(np.sort(rewards, axis=1)[:, -2:].mean())
    assert result["mean_reward_generated"] == pytest.approx(rewards.mean())
    assert set(result) == {"updated_logits", "mean_reward", "n_selected", "mean_reward_generated"}


@pytest.mark.parametrize("bad", [NAN, INF, -INF, None])
@pytest.mark.parametrize("weighting", ["uniform", "reward"])
def test_a_reward_that_is_not_finite_is_never_kept(bad: float | None, weighting: Any) -> None:
    calls = iter([bad, 2.0, bad, 1.0] + [bad] * 4)
    asked: list[int] = []

    def failing(prompt: int, answer: int) -> float | None:
        asked.append(answer)
        return next(calls)

    result = raft_iteration(LOGITS, [0, 1], failing, 4, 0.75, 1.0, weighting=weighting, rng=6)
    values = [2.0, 1.0] if weighting == "reward" else [1.0, 1.0]
    terms = [v * (np.eye(3)[asked[k]] - softmax(LOGITS)[0]) for v, k in zip(values, (1, 3), strict=True)]
    np.testing.assert_allclose(result["updated_logits"][0] - LOGITS[0], np.mean(terms, axis=0) / 2, atol=1e-14)
    np.testing.assert_array_equal(result["updated_logits"][1], LOGITS[1])
    assert (result["n_selected"], result["mean_reward"], result["mean_reward_generated"]) == (2, 1.5, 1.5)


def test_with_no_finite_reward_at_all_nothing_moves_and_means_are_zero() -> None:
    result = raft_iteration(LOGITS, [0, 1], lambda *_: NAN, lr=1.0, rng=0)
    np.testing.assert_array_equal(result["updated_logits"], LOGITS)
    assert (result["n_selected"], result["mean_reward"], result["mean_reward_generated"]) == (0, 0.0, 0.0)


def test_no_prompts_give_zeros() -> None:
    result = raft_iteration(np.zeros((0, 3)), [], reward, rng=0)
    assert result["updated_logits"].shape == (0, 3)
    assert (result["n_selected"], result["mean_reward"], result["mean_reward_generated"]) == (0, 0.0, 0.0)


def test_the_logits_given_are_never_changed_and_integers_become_floats() -> None:
    for dtype in (np.int64, np.float32, np.float64):
        logits = np.array([[0, 1, 0], [2, 0, 0]], dtype)
        before = logits.copy()
        updated = raft_iteration(logits, [0, 1], reward, lr=1.0, rng=0)["updated_logits"]
        np.testing.assert_array_equal(logits, before)
        assert updated.dtype == (np.float64 if dtype is np.int64 else dtype)
        assert not np.shares_memory(updated, logits) and (updated != before).any()


def test_lists_are_logits_too() -> None:
    updated = raft_iteration([[0, 1]], ["hello"], lambda prompt, answer: len(prompt) + answer, rng=0)["updated_logits"]
    assert updated.shape == (1, 2)


def test_large_logits_neither_overflow_nor_lose_their_samples() -> None:
    asked = Recorder()
    result = raft_iteration([[1e4, 0, -INF], [-1e4, -1e4, -2e4]], [0, 1], asked, 50, 1.0, 1.0, rng=0)
    assert set(asked.asked) == {(0, 0), (1, 0), (1, 1)}
    assert not np.isnan(result["updated_logits"]).any()
    assert result["updated_logits"][0].tolist() == [1e4, 0, -INF]


def test_the_same_seed_repeats_and_global_state_is_left_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    a, b, c = (raft_iteration(LOGITS, [0, 1], reward, lr=1.0, rng=seed)["updated_logits"] for seed in (9, 9, 10))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_a_generator_moves_on() -> None:
    rng = np.random.default_rng(0)
    a, b = (raft_iteration(LOGITS, [0, 1], reward, lr=1.0, rng=rng)["updated_logits"] for _ in range(2))
    assert (a != b).any()


def test_repeated_steps_find_the_best_completions() -> None:
    rng, logits = np.random.default_rng(0), LOGITS
    for _ in range(300):
        logits = raft_iteration(logits, [0, 1], reward, lr=1.0, rng=rng)["updated_logits"]
    p = softmax(logits)
    assert p[0, 2] > 0.95 and p[1, :2].sum() > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_logits": np.zeros(3)}, r"policy_logits must have shape \(n_prompts, V\).*got \(3,\) for 2 prompts"),
        ({"policy_logits": np.zeros((3, 3))}, r"got \(3, 3\) for 2 prompts"),
        ({"policy_logits": np.zeros((2, 0))}, "at least one completion"),
        ({"policy_logits": [[0, NAN], [0, 0]]}, "policy_logits must be finite"),
        ({"policy_logits": [[0, INF], [0, 0]]}, "policy_logits must be finite"),
        ({"policy_logits": [[-INF, -INF], [0, 0]]}, "a row of -inf"),
        ({"policy_logits": [["a", "b"], ["c", "d"]]}, "policy_logits must be real numbers"),
        ({"n_candidates": 0}, "n_candidates must be a whole number of at least 1; got 0"),
        ({"n_candidates": 2.5}, "n_candidates must be a whole number of at least 1; got 2.5"),
        ({"top_fraction": 30}, r"top_fraction must be in \(0, 1\]; got 30\. .*not a percentage: write 0\.3\."),
        ({"top_fraction": 0}, r"top_fraction must be in \(0, 1\]; got 0"),
        ({"top_fraction": NAN}, r"top_fraction must be in \(0, 1\]; got nan"),
        ({"lr": NAN}, "lr must be a finite number"),
        ({"lr": -1.0}, "lr must be a finite number of at least 0; got -1.0"),
        ({"weighting": "rank"}, 'weighting must be "uniform" or "reward"; got \'rank\''),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"policy_logits": LOGITS, "prompts": [0, 1], "reward_fn": reward} | change
    with pytest.raises(ValueError, match=message):
        raft_iteration(**arguments)


def test_one_candidate_of_one_completion_is_its_own_best() -> None:
    for n, fraction in product((1, 3), (0.1, 1.0)):
        result = raft_iteration([[4.0]], [0], reward, n, fraction, 1.0, rng=0)
        assert result["updated_logits"].tolist() == [[4.0]]
