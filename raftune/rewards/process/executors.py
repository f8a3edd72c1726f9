"""Executors of reward calls: inline, thread, event loop or process; time limits, and what a call may leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import locale
import os
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from raftune.engines.process import ProcessDied
from raftune.errors import RewardError
from raftune.protocols import Reward
from raftune.records import ScoreStatus
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import RewardOutcome, attempt, attempt_async, same_for_all
from raftune.store.interruption import interrupting

T = TypeVar("T")
# Variables that raftune, and the libraries that a run uses, read while it goes on.
READ_LATER = (
    *("RAFTUNE_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DIFFUSERS_", "ACCELERATE_", "TRL_", "TORCH"),
    *("PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "LC_", "LANG", "TMPDIR", "HOME", "TZ"),
)
MOST_TRIES = 3
PAUSE_SECONDS = 0.25  # before another try after a death that came from outside, and twice that before the next


class Executor:
    """Calls one reward and gives up a call that takes too long. This one calls a reward model inline.

    No time limit can interrupt it there; but each thread that uses tensors gets a pool of OpenMP threads of its own,
    and a model on its own thread made all later generating twice as slow.
    """

    place = "here"  # here, thread, loop or process

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        """Starts a call; what the reward raises is in its outcome. Inline the call is over when this returns."""
        self._reward.prepare()
        return finished(attempt(self._reward, batch, main_thread=True))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        """Leaves the call behind; says in words what became of it."""
        return "it had ended"

    def died(self, death: ProcessDied) -> None:
        """Notes that the reward's process died, and that the batch is sent again."""

    def close(self) -> None:
        """Ends what the executor started."""


class ThreadExecutor(Executor):
    """A callable in this process. Python cannot end a thread: a hung call is left behind and goes on."""

    place = "thread"

    def __init__(self, reward: Any) -> None:
        super().__init__(reward)
        self._thread = WorkerThread(f"raftune reward {reward.name}")

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        return self._thread.submit(lambda: attempt(self._reward, batch))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        self._thread.close()
        self._thread.replace()
        return "its thread was left behind (a reward given as file.py:function could have been ended)"

    def close(self) -> None:
        self._thread.close()


class AsyncExecutor(Executor):
    """An async callable, on the loop that all async rewards of a set share: they wait side by side."""

    place = "loop"

    def __init__(self, reward: Any, loop: EventLoopThread) -> None:
        super().__init__(reward)
        self._loop = loop

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        return self._loop.submit(attempt_async(self._reward, batch))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        future.cancel()
        with contextlib.suppress(TimeoutError, CancelledError):
            future.result(timeout=0.1)
        if self._loop.recover():
            return "it was cancelled"
        return "an async reward blocked the loop that they share (it must await, not sleep); the loop was left behind"


def executor_for(reward: Reward | Executor, loop: EventLoopThread) -> Executor:
    """Where this reward runs; `loop` serves those that are async."""
    if isinstance(reward, Executor):
        return reward
    if reward.is_async:
        return AsyncExecutor(reward, loop)
    return Executor(reward) if reward.has_weights else ThreadExecutor(reward)


def finished(outcome: RewardOutcome) -> Future[RewardOutcome]:
    future: Future[RewardOutcome] = Future()
    future.set_result(outcome)
    return future


def call(executor: Executor, batch: RewardBatch, limit: float) -> RewardOutcome:
    """The outcome of one call, within `limit` seconds."""
    with undisturbed():
        return finish(executor, batch, limit, executor.start(batch), time.monotonic() + limit)


def finish(
    executor: Executor, batch: RewardBatch, limit: float, future: Future[RewardOutcome], deadline: float
) -> RewardOutcome:
    """The outcome of a started call, or a time-out once the deadline (of `time.monotonic`) has passed.

    If its process dies, the batch is sent again, with its whole time. Raises RewardError if that does not help.
    """
    deaths: list[bool] = []
    while True:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            if interrupting(error) is not None:  # of a script's handler of SIGALRM, say
                raise
            detail = f"no answer within {limit:g} s; {executor.give_up(future)}"
            return same_for_all(ScoreStatus.TIMEOUT, detail, len(batch))
        except ProcessDied as death:
            if keeps_dying(getattr(executor, "name", ""), deaths, death):
                return same_for_all(ScoreStatus.ERROR, f"the reward's process {death.reason}", len(batch))
            executor.died(death)
        future, deadline = executor.start(batch), time.monotonic() + limit


def keeps_dying(name: str, deaths: list[bool], death: ProcessDied) -> bool:
    """True if a reward ended its own process too often; False: try again. Raises RewardError for other deaths.

    `deaths` of the same batch, or of the same start, are counted by whether they were the reward's own.
    """
    deaths.append(death.own)
    count = deaths.count(death.own)
    if count < MOST_TRIES:
        if not death.own:
            time.sleep(PAUSE_SECONDS * count)
        return False
    if death.own:
        return True
    raise RewardError(
        f"reward {name!r}: its process {death.reason}, {MOST_TRIES} times in a row. That is no answer of the "
        "reward: is the machine short of memory or of disk? What was scored before is kept; resume when it is not."
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restores what a reward may change of this process: working folder, environment variables that are read later,
    locale, stdout and stderr, torch's defaults. Random states are left alone: a reward must not draw the same again."""
    try:
        folder = Path.cwd()
    except FileNotFoundError:  # it was deleted
        folder = None
    environ = {name: value for name, value in os.environ.items() if name.startswith(READ_LATER)}
    words, streams = locale.setlocale(locale.LC_ALL), (sys.stdout, sys.stderr)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        strict = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
        threads = torch.get_num_threads()  # another thread's number is not seen from here, and counts for MKL
        cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("benchmark", "deterministic", "allow_tf32")}
    try:
        yield
    finally:
        if folder is not None:
            with contextlib.suppress(OSError):
                os.chdir(folder)
        for name in [name for name in os.environ if name.startswith(READ_LATER) and name not in environ]:
            del os.environ[name]
        os.environ.update({name: value for name, value in environ.items() if os.environ.get(name) != value})
        if locale.setlocale(locale.LC_ALL) != words:
            locale.setlocale(locale.LC_ALL, words)
        sys.stdout, sys.stderr = streams
        if torch is not None:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(strict, warn_only=warn_only)
            for name, value in cudnn.items():
                setattr(torch.backends.cudnn, name, value)


class WorkerThread:
    """One daemon thread that does one job after another. A thread that hangs is left behind and never joined."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.replace()

    def replace(self) -> None:
        """Starts a new thread, and leaves the one before it to its job."""
        jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._jobs = jobs

        def work() -> None:
            while (item := jobs.get()) is not None:
                job, future = item
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=work, name=self._name, daemon=True).start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def close(self) -> None:
        self._jobs.put(None)


class EventLoopThread:
    """An event loop on a daemon thread, started when first needed: a notebook's own loop is running already."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_turn, args=(self._loop,), name="raftune async rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def recover(self, patience: float = 1.0) -> bool:
        """True if the loop still turns; otherwise it is left behind, and the next call starts a new one."""
        turning = threading.Event()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(turning.set)
            if not turning.wait(patience):
                self._loop = None
                return False
        return True

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
