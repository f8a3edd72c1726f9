"""Where a reward runs: on the caller's thread, or where the caller can stop waiting: a thread, the loop, a process."""

from __future__ import annotations

import contextlib
import locale
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Protocol

from raftune.interruption import interrupting
from raftune.protocols import Reward
from raftune.records import Status
from raftune.rewards.batch import Batch
from raftune.rewards.hosted import Deaths, Died, HostedReward
from raftune.rewards.outcome import Outcome, attempt, attempt_async, whole
from raftune.rewards.runner import Loop, Runner


class Place(Protocol):
    """Starts calls of one reward, and gives up one that takes too long. What a reward raises, a future does not."""

    @property
    def place(self) -> str:
        """here, thread, loop or process."""
        ...

    def start(self, batch: Batch) -> Future[Outcome]: ...

    def give_up(self, future: Future[Outcome]) -> str:
        """Leaves the call behind; says in words what became of it."""
        ...

    def close(self) -> None: ...


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


# Variables that raftune, and the libraries that a run uses, read while it goes on.
READ_LATER = (
    *("RAFTUNE_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DIFFUSERS_", "ACCELERATE_", "TRL_", "TORCH"),
    *("PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "LC_", "LANG", "TMPDIR", "HOME", "TZ"),
)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what a reward in this process changes of the process, where that would shape what follows: the working
    folder (a run's own paths may be relative to it), environment variables that are read later, the locale, stdout and
    stderr, torch's defaults.

    It is the caller's thread that puts them back. One that was left behind by a reward may end much later, when the
    folder is another on purpose. Random states are left alone: a run seeds each of its own draws, and a reward that
    draws from `random` must not draw the same again. Grad mode and decimal contexts belong to the reward's thread.
    """
    try:
        before = Path.cwd()
    except FileNotFoundError:  # it was deleted under us
        before = None
    environ, words, streams = read_later(), locale.setlocale(locale.LC_ALL), (sys.stdout, sys.stderr)
    restore_torch = torch_defaults()
    try:
        yield
    finally:
        if before is not None:
            with contextlib.suppress(OSError):
                os.chdir(before)
        for name in read_later().keys() - environ.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in environ.items() if os.environ.get(name) != value})
        if locale.setlocale(locale.LC_ALL) != words:
            locale.setlocale(locale.LC_ALL, words)
        sys.stdout, sys.stderr = streams
        restore_torch()


def read_later() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(READ_LATER)}


def torch_defaults() -> Callable[[], None]:
    """Puts torch's settings for the whole process back to what they are now; does nothing where torch is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return lambda: None
    dtype, threads, precision = torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")}

    def restore() -> None:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)  # another thread's number is not seen from here, and counts for MKL
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)

    return restore


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


def call(seat: Place, batch: Batch, limit: float) -> Outcome:
    """The outcome of one call, within `limit` seconds."""
    with undisturbed():
        return finish(seat, batch, limit, seat.start(batch), time.monotonic() + limit)


def finish(seat: Place, batch: Batch, limit: float, future: Future[Outcome], deadline: float) -> Outcome:
    """The outcome of a call that was started, or a time-out once the deadline (of `time.monotonic`) has passed.

    A process that dies under it is no outcome: the batch is asked again, in its whole time. Raises RewardError where
    that does not help.
    """
    deaths = Deaths(getattr(seat, "name", ""))
    while True:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            if interrupting(error) is not None:  # of a script's handler of SIGALRM, say
                raise
            return whole(Status.TIMEOUT, f"no answer within {limit:g} s; {seat.give_up(future)}", len(batch))
        except Died as death:
            assert isinstance(seat, HostedReward)
            if (outcome := deaths.add(death, len(batch))) is not None:
                return outcome
            seat.died(death)
        future, deadline = seat.start(batch), time.monotonic() + limit
