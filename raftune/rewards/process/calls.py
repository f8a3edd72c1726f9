"""Calls a reward with a time limit, and handles the death of its process."""

from __future__ import annotations

import contextlib
import locale
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from raftune.errors import RewardError
from raftune.records import ScoreStatus
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import RewardOutcome, whole
from raftune.store.interruption import interrupting

# Variables that raftune, and the libraries that a run uses, read while it goes on.
READ_LATER = (
    *("RAFTUNE_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_", "DIFFUSERS_", "ACCELERATE_", "TRL_", "TORCH"),
    *("PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "LC_", "LANG", "TMPDIR", "HOME", "TZ"),
)


MOST_TRIES = 3


PAUSE_SECONDS = 0.25  # before another try after a death that came from outside, and twice that before the next


class ProcessDied(Exception):
    """The reward's process died. `own`: caused by its own code, so that a retry would fail again."""

    def __init__(self, how: str, own: bool) -> None:
        super().__init__(how)
        self.how, self.own = how, own


class DeathCounter:
    """Counts how often the process died under one batch, and says when that is enough."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts = {True: 0, False: 0}

    def add(self, death: ProcessDied, size: int) -> RewardOutcome | None:
        """An `error` where it is the reward's own; None: ask again. Raises RewardError for other deaths."""
        self._counts[death.own] += 1
        if self._counts[death.own] < MOST_TRIES:
            if not death.own:
                time.sleep(PAUSE_SECONDS * self._counts[False])
            return None
        if death.own:
            return whole(ScoreStatus.ERROR, f"the reward's process {death.how}", size)
        raise RewardError(
            f"reward {self.name!r}: its process {death.how}, {MOST_TRIES} times in a row. That is no answer of the "
            "reward: is the machine short of memory or of disk? What was scored before is kept; resume when it is not."
        )


class Executor(Protocol):
    """Starts calls of one reward, and gives up one that takes too long. What a reward raises, a future does not."""

    @property
    def place(self) -> str:
        """here, thread, loop or process."""
        ...

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]: ...

    def give_up(self, future: Future[RewardOutcome]) -> str:
        """Leaves the call behind; says in words what became of it."""
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Puts back what a reward in this process changes of the process, where that would shape what follows: the working
    folder (a run's own paths may be relative to it), environment variables that are read later, the locale, stdout and
    stderr, torch's defaults.

    It is the caller's thread that puts them back. One that was left behind by a reward may end much later, when the
    folder is another on purpose. Random states are left alone: a run seeds each of its own samples, and a reward that
    draws from `random` must not draw the same again. Grad mode and decimal contexts belong to the reward's
    thread.
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


@runtime_checkable
class MayDie(Executor, Protocol):
    """A reward in a process of its own, which can die under a call."""

    def died(self, death: ProcessDied) -> None: ...


def call(seat: Executor, batch: RewardBatch, limit: float) -> RewardOutcome:
    """The outcome of one call, within `limit` seconds."""
    with undisturbed():
        return finish(seat, batch, limit, seat.start(batch), time.monotonic() + limit)


def finish(
    seat: Executor, batch: RewardBatch, limit: float, future: Future[RewardOutcome], deadline: float
) -> RewardOutcome:
    """The outcome of a call that was started, or a time-out once the deadline (of `time.monotonic`) has passed.

    A process that dies under it is no outcome: the batch is asked again, in its whole time. Raises RewardError where
    that does not help.
    """
    deaths = DeathCounter(getattr(seat, "name", ""))
    while True:
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            if interrupting(error) is not None:  # of a script's handler of SIGALRM, say
                raise
            return whole(ScoreStatus.TIMEOUT, f"no answer within {limit:g} s; {seat.give_up(future)}", len(batch))
        except ProcessDied as death:
            assert isinstance(seat, MayDie)
            if (outcome := deaths.add(death, len(batch))) is not None:
                return outcome
            seat.died(death)
        future, deadline = seat.start(batch), time.monotonic() + limit
