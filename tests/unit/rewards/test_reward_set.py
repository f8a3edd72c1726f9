"""From the parts of several rewards to one score."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raftune.config.rewards import RewardsConfig
from raftune.errors import ConfigError
from raftune.records import Score, ScoreStatus
from raftune.rewards import RewardBatch, RewardSet, load_reward, load_rewards
from raftune.rewards.builtin.length import LengthReward
from raftune.rewards.resolve import FunctionReward
from raftune.store import interruption
from raftune.store import partial as unfinished


def batch(size: int = 3, **columns: list[Any]) -> RewardBatch:
    return RewardBatch([f"q{i}" for i in range(size)], [f"a{i}" for i in range(size)], columns)


def gives(*returned: Any) -> FunctionReward:
    return FunctionReward(lambda completions, **kwargs: list(returned), name=f"r{len(returned)}")


def score(rewards: list[Any], asked: RewardBatch, **options: Any) -> list[Score]:
    names = options.pop("names", [f"r{i}" for i in range(len(rewards))])
    with RewardSet(rewards, names=names, **options) as reward_set:
        return reward_set.score(asked)


def test_the_score_is_the_weighted_sum_of_the_parts() -> None:
    scores = score([gives(1, 2, 3), gives(10, 20, 30)], batch(), weights=[0.5, -1.0])
    assert [s.value for s in scores] == [-9.5, -19.0, -28.5]
    assert {name: part.value for name, part in scores[1].parts.items()} == {"r0": 2.0, "r1": 20.0}


def test_an_interrupted_scoring_asks_only_for_the_batches_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(unfinished, "SHARE", 1e9)
    asked: list[list[str]] = []

    def reward(completions: list[str], log_metric: Any, **kwargs: Any) -> list[float | None]:
        asked.append(completions)
        log_metric("asked", len(completions))
        return [None if text == "a3" else 0.1 * int(text[1:]) for text in completions]

    def scored(at: Path) -> tuple[list[Score], Any]:
        with (
            unfinished.unfinished_work(at, at / "tmp", "00000", "key", {}),
            RewardSet([FunctionReward(reward, name="r")], batch_size=4) as rewards,
        ):
            return rewards.score(batch(10)), rewards.extras

    whole = scored(tmp_path / "whole")
    calls = len(asked)

    def stop() -> None:
        if len(asked) == calls + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(interruption, "raise_if_asked", stop)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "cut")
    assert scored(tmp_path / "cut") == whole
    assert [len(texts) for texts in asked[calls:]] == [4, 4, 2]


def test_a_part_that_does_not_apply_is_left_out_of_the_sum_and_without_any_the_score_does_not_apply() -> None:
    scores = score([gives(1, None, None), gives(None, 5, None)], batch(), weights=[1.0, 2.0])
    assert [(s.value, s.status) for s in scores] == [
        (1.0, ScoreStatus.OK),
        (10.0, ScoreStatus.OK),
        (None, ScoreStatus.NOT_APPLICABLE),
    ]


def test_one_unusable_part_makes_the_whole_sample_unusable_and_only_that_sample() -> None:
    scores = score([gives(1, 2, 3), gives(1, math.nan, 1)], batch())
    assert [(s.value, s.status) for s in scores] == [
        (2.0, ScoreStatus.OK),
        (None, ScoreStatus.INVALID),
        (4.0, ScoreStatus.OK),
    ]
    assert scores[1].parts["r0"].value == 2.0


def test_of_several_failures_an_error_names_the_sample_before_a_time_out_and_a_time_out_before_an_invalid_part() -> (
    None
):
    def raises(**kwargs: Any) -> Any:
        raise OSError("x")

    hang = partial(_sleep, 5)
    invalid = gives(math.nan, math.nan)
    three = [invalid, FunctionReward(hang), FunctionReward(raises)]
    assert {s.status for s in score(three, batch(2), timeouts=0.2)} == {ScoreStatus.ERROR}
    assert {s.status for s in score(three[:2], batch(2), timeouts=0.2)} == {ScoreStatus.TIMEOUT}


def _sleep(seconds: float, completions: list[str], **kwargs: Any) -> list[float]:
    time.sleep(seconds)
    return [1.0] * len(completions)


def test_a_sum_beyond_the_range_of_floats_is_invalid() -> None:
    assert score([gives(1.0), gives(1.0)], batch(1), weights=[1.7e308, 1.7e308])[0].status is ScoreStatus.INVALID


def test_a_reward_is_called_by_keyword_with_all_that_the_contract_names() -> None:
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0]

    asked = RewardBatch(
        ["q"],
        [[{"role": "assistant", "content": "a"}]],
        {"answer": [7], "prompt": ["clash"]},
        [[5, 2]],
        {"global_step": 4},
    )
    score([FunctionReward(reward)], asked)
    wanted = {"prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric"}
    assert set(seen) == wanted
    assert (seen["answer"], seen["completion_ids"], seen["trainer_state"].global_step) == ([7], [[5, 2]], 4)
    assert seen["completions"] == [[{"role": "assistant", "content": "a"}]]


def test_a_function_without_kwargs_gets_only_the_keywords_that_it_names() -> None:
    reward = load_reward(lambda completions, answer: [float(c == a) for c, a in zip(completions, answer, strict=True)])
    assert reward.accepts == {"completions", "answer"}
    assert [s.value for s in score([reward], batch(2, answer=["a0", "x"], other=[1, 2]))] == [1.0, 0.0]


def test_a_keyword_that_no_column_gives_is_named() -> None:
    part = score([load_reward(lambda completions, answer: [0.0])], batch(1, solution=["x"]))[0].parts["r0"]
    assert part.status is ScoreStatus.ERROR
    assert "needs 'answer', which is not passed; there are:" in part.detail
    assert "solution" in part.detail


def test_a_reward_that_changes_its_lists_changes_no_other_reward() -> None:
    def greedy(completions: list[Any], answer: list[Any], **kwargs: Any) -> list[float]:
        completions[0][0]["content"] = "changed"
        answer.clear()
        return [0.0]

    def honest(completions: list[Any], answer: list[Any], **kwargs: Any) -> list[float]:
        return [float(completions[0][0]["content"] == "a" and answer == ["b"])]

    asked = RewardBatch(["q"], [[{"role": "assistant", "content": "a"}]], {"answer": ["b"]})
    assert score([FunctionReward(greedy), FunctionReward(honest)], asked)[0].value == 1.0
    assert asked.columns == {"answer": ["b"]}


def test_calls_hold_batch_size_samples_and_the_scores_keep_their_order() -> None:
    sizes: list[int] = []

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        sizes.append(len(completions))
        return [float(text[1:]) for text in completions]

    scores = score([FunctionReward(reward)], batch(10), batch_size=4)
    assert sizes == [4, 4, 2]
    assert [s.value for s in scores] == [float(i) for i in range(10)]
    assert score([FunctionReward(reward)], batch(0)) == []


def test_async_rewards_wait_side_by_side_on_one_loop() -> None:
    met = asyncio.Barrier(2)  # each waits for the other: one after another would time out

    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        await met.wait()
        return [1.0] * len(completions)

    scores = score([FunctionReward(reward), FunctionReward(partial(reward))], batch(2), timeouts=5.0)
    assert [s.value for s in scores] == [2.0, 2.0]


def test_async_rewards_run_where_a_loop_is_running_already() -> None:
    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook_cell() -> list[Score]:
        return score([FunctionReward(reward)], batch(2))

    assert [s.value for s in asyncio.run(notebook_cell())] == [1.0, 1.0]


def test_an_async_reward_that_blocks_the_loop_times_out_and_the_next_call_has_a_new_loop() -> None:
    calls: list[int] = []

    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(3)
        return [1.0] * len(completions)

    with RewardSet([FunctionReward(reward)], timeouts=0.2) as rewards:
        first, second = rewards.score(batch(1))[0], rewards.score(batch(1))[0]
    assert first.status is ScoreStatus.TIMEOUT
    assert "blocked the loop" in first.parts["reward"].detail
    assert second.value == 1.0


def test_a_lambda_that_returns_an_awaitable_is_awaited() -> None:
    async def inner(completions: list[str]) -> list[float]:
        return [2.0] * len(completions)

    assert score([load_reward(lambda completions, **kwargs: inner(completions))], batch(1))[0].value == 2.0


def test_errors_are_tried_again_as_often_as_configured_and_invalid_values_are_not() -> None:
    calls: list[str] = []

    def flaky(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append("flaky")
        if calls.count("flaky") < 3:
            raise ConnectionError("busy")
        return [1.0] * len(completions)

    def invalid(completions: list[str], **kwargs: Any) -> list[float]:
        calls.append("invalid")
        return [math.nan] * len(completions)

    assert score([FunctionReward(flaky)], batch(1), retries=1)[0].status is ScoreStatus.ERROR
    calls.clear()
    assert score([FunctionReward(flaky)], batch(1), retries=2)[0].value == 1.0
    score([FunctionReward(invalid)], batch(1), retries=2)
    assert calls.count("invalid") == 1


def test_what_rewards_log_is_kept_sample_by_sample_and_metrics_are_averaged() -> None:
    def reward(completions: list[str], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        if "a2" in completions:
            raise ValueError
        log_extra("said", [text.upper() for text in completions])
        log_metric("length", len(completions))
        return [0.0] * len(completions)

    with RewardSet([FunctionReward(reward)], batch_size=2) as rewards:
        rewards.score(batch(5))
        assert rewards.extras.columns == {"said": ["A0", "A1", None, None, "A4"]}
        assert rewards.extras.metrics == {"length": 1.5}


def test_callables_run_off_the_main_thread_one_after_another() -> None:
    ran: list[str] = []

    def first(completions: list[str], **kwargs: Any) -> list[float]:
        time.sleep(0.05)
        ran.append("first")
        return [float(threading.current_thread() is not threading.main_thread())]

    def second(completions: list[str], **kwargs: Any) -> list[float]:
        ran.append("second")
        return [1.0]

    assert score([FunctionReward(first), FunctionReward(second)], batch(1))[0].value == 2.0
    assert ran == ["first", "second"]


class Judge:
    """A reward that keeps a setting."""

    def __init__(self, best: str) -> None:
        self.best = best

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        return [float(text == self.best) for text in completions]


def test_objects_partials_lambdas_and_our_own_rewards_are_taken_as_they_are() -> None:
    objects = [
        Judge("a1"),
        partial(_sleep, 0.0),
        lambda completions, **kwargs: [0.25] * len(completions),
        LengthReward(max=9),
        Judge("a0"),
    ]
    with load_rewards(RewardsConfig(), objects, weights=[1, 2, 4, 1, 1]) as rewards:
        assert rewards.names == ("Judge", "_sleep", "lambda", "length", "Judge_2")
        assert [s.value for s in rewards.score(batch(2))] == [4.0, 4.0]
        assert rewards.score(batch(3))[2].value == 3.0


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan]])
def test_weights_must_match_the_rewards_and_be_finite(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="reward_weights must"):
        RewardSet([gives(1), gives(2)], names=["a", "b"], weights=weights)


def test_the_reward_set_s_fingerprint_follows_names_weights_and_rewards() -> None:
    def of(*rewards: Any, **options: Any) -> str:
        with RewardSet(list(rewards), **options) as reward_set:
            return reward_set.fingerprint

    one = LengthReward(max=3)
    prints = [
        of(one),
        of(one, weights=[2.0]),
        of(one, names=["x"]),
        of(LengthReward(max=4)),
        of(one, LengthReward(max=4), names=["length", "b"]),
    ]
    assert len(set(prints)) == 5
    assert of(one) == of(LengthReward(max=3), timeouts=3.0, retries=2)


def test_a_reward_that_leaves_the_working_folder_leaves_it_for_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def leaves(completions: list[Any], **kwargs: Any) -> list[float]:
        os.chdir(tmp_path / "elsewhere")
        return [1.0] * len(completions)

    async def leaves_later(completions: list[Any], **kwargs: Any) -> list[float]:
        return leaves(completions)

    def raises(completions: list[Any], **kwargs: Any) -> list[float]:
        os.chdir("/")
        raise ValueError("gone")

    for reward in (leaves, leaves_later, raises):
        score([load_reward(reward)], batch())
        assert Path.cwd() == tmp_path


def test_a_call_that_was_left_behind_and_ends_later_does_not_change_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, ended = threading.Event(), threading.Event()

    def hangs(completions: list[Any], **kwargs: Any) -> list[float]:
        threading.Thread(target=lambda: (goes_on.wait(20), time.sleep(0.2), ended.set())).start()
        goes_on.wait(20)
        return [1.0] * len(completions)

    monkeypatch.chdir("/")
    assert score([load_reward(hangs)], batch(), timeouts=[0.05])
    monkeypatch.chdir(tmp_path)
    goes_on.set()
    assert ended.wait(20)
    assert Path.cwd() == tmp_path


def test_the_detail_of_an_error_names_file_and_line_of_the_users_code_and_not_ours() -> None:
    def raises(completions: list[Any], **kwargs: Any) -> list[float]:
        return json.loads("{")

    first = raises.__code__.co_firstlineno
    part = score([load_reward(raises)], batch())[0].parts["r0"]
    assert part.detail.endswith(f" (test_reward_set.py, line {first + 1})")
