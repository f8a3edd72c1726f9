"""Executors of reward calls: inline, thread, event loop or process."""

from __future__ import annotations

import contextlib
from concurrent.futures import CancelledError, Future
from typing import Any

from raftune.protocols import Reward
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import RewardOutcome, attempt, attempt_async
from raftune.rewards.process.calls import Executor
from raftune.rewards.process.client import ProcessReward
from raftune.rewards.process.threads import EventLoopThread, WorkerThread


class InlineExecutor:
    """A reward model, on the caller's own thread, where no time limit can interrupt it.

    Each thread that uses tensors gets a pool of OpenMP threads of its own, and with more of these than cores every
    parallel step waits on the scheduler: a model on a thread of its own made all later generating twice as slow.
    """

    place = "here"

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        """The call is over when this returns."""
        self._reward.prepare()
        future: Future[RewardOutcome] = Future()
        future.set_result(attempt(self._reward, batch, ours=True))
        return future

    def give_up(self, future: Future[RewardOutcome]) -> str:
        return "it had ended"

    def close(self) -> None:
        """Nothing to end."""


class ThreadExecutor:
    """A callable in this process. Python cannot end a thread: a hung call is left behind and goes on.

    Time limits that a reward sets itself by signals work on the main thread only, hence not here.
    """

    place = "thread"

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self._runner = WorkerThread(f"raftune reward {reward.name}")

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        return self._runner.submit(lambda: attempt(self._reward, batch))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        self._runner.replace()
        return "its thread was left behind (a reward given as file.py:function could have been ended)"

    def close(self) -> None:
        self._runner.close()


class AsyncExecutor:
    """An async callable, on the loop that all async rewards of a panel share: they wait side by side."""

    place = "loop"

    def __init__(self, reward: Any, loop: EventLoopThread) -> None:
        self._reward, self._loop = reward, loop

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        return self._loop.submit(attempt_async(self._reward, batch))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        future.cancel()
        with contextlib.suppress(TimeoutError, CancelledError):
            future.result(timeout=0.1)
        if self._loop.recover():
            return "it was cancelled"
        return "an async reward blocked the loop that they share (it must await, not sleep); the loop was left behind"

    def close(self) -> None:
        """Leaves the loop to whoever made it."""


def place(reward: Reward, loop: EventLoopThread) -> Executor:
    """Where this reward runs; `loop` serves those that are async."""
    if isinstance(reward, ProcessReward):
        return reward
    if getattr(reward, "is_async", False):
        return AsyncExecutor(reward, loop)
    if hasattr(reward, "prepare"):
        return InlineExecutor(reward)
    return ThreadExecutor(reward)
