"""Where a reward runs: on the caller's thread, or where the caller can stop waiting: a thread, the loop, a process."""

from __future__ import annotations

import contextlib
from concurrent.futures import CancelledError, Future
from typing import Any

from raftune.protocols import Reward
from raftune.rewards.batch import Batch
from raftune.rewards.outcome import Outcome, attempt, attempt_async
from raftune.rewards.process.calls import Place
from raftune.rewards.process.client import HostedReward
from raftune.rewards.process.threads import Loop, Runner


class Here:
    """A reward model, on the caller's own thread, where no time limit can interrupt it.

    Each thread that uses tensors gets a pool of OpenMP threads of its own, and with more of these than cores every
    parallel step waits on the scheduler: a model on a thread of its own made all later drawing twice as slow.
    """

    place = "here"

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def start(self, batch: Batch) -> Future[Outcome]:
        """The call is over when this returns."""
        self._reward.prepare()
        future: Future[Outcome] = Future()
        future.set_result(attempt(self._reward, batch, ours=True))
        return future

    def give_up(self, future: Future[Outcome]) -> str:
        return "it had ended"

    def close(self) -> None:
        """Nothing to end."""


class OnThread:
    """A callable in this process. Python cannot end a thread: a hung call is left behind and goes on.

    Time limits that a reward sets itself by signals work on the main thread only, hence not here.
    """

    place = "thread"

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self._runner = Runner(f"raftune reward {reward.name}")

    def start(self, batch: Batch) -> Future[Outcome]:
        return self._runner.submit(lambda: attempt(self._reward, batch))

    def give_up(self, future: Future[Outcome]) -> str:
        self._runner.replace()
        return "its thread was left behind (a reward given as file.py:function could have been ended)"

    def close(self) -> None:
        self._runner.close()


class OnLoop:
    """An async callable, on the loop that all async rewards of a panel share: they wait side by side."""

    place = "loop"

    def __init__(self, reward: Any, loop: Loop) -> None:
        self._reward, self._loop = reward, loop

    def start(self, batch: Batch) -> Future[Outcome]:
        return self._loop.submit(attempt_async(self._reward, batch))

    def give_up(self, future: Future[Outcome]) -> str:
        future.cancel()
        with contextlib.suppress(TimeoutError, CancelledError):
            future.result(timeout=0.1)
        if self._loop.recover():
            return "it was cancelled"
        return "an async reward blocked the loop that they share (it must await, not sleep); the loop was left behind"

    def close(self) -> None:
        """Leaves the loop to whoever made it."""


def place(reward: Reward, loop: Loop) -> Place:
    """Where this reward runs; `loop` serves those that are async."""
    if isinstance(reward, HostedReward):
        return reward
    if getattr(reward, "is_async", False):
        return OnLoop(reward, loop)
    if hasattr(reward, "prepare"):
        return Here(reward)
    return OnThread(reward)
