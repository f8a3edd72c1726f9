"""Threads for reward calls that may be abandoned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
Job = tuple[Callable[[], Any], "Future[Any]"]


class WorkerThread:
    """One daemon thread that does one job after another. A thread that hangs is left behind and never joined."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs = self._begin()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def replace(self) -> None:
        """Leaves the thread to its job and goes on with a new one."""
        self.close()
        self._jobs = self._begin()

    def close(self) -> None:
        self._jobs.put(None)

    def _begin(self) -> SimpleQueue[Job | None]:
        jobs: SimpleQueue[Job | None] = SimpleQueue()
        threading.Thread(target=_work, args=(jobs,), name=self._name, daemon=True).start()
        return jobs


def _work(jobs: SimpleQueue[Job | None]) -> None:
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)


class EventLoopThread:
    """An event loop on a daemon thread, begun when first needed: a notebook's own loop is running already."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        self._loop = self._loop or _begin_loop()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def recover(self, patience: float = 1.0) -> bool:
        """True if the loop still turns; otherwise it is left behind, and the next call begins a new one."""
        if self._loop is None:
            return True
        turning = threading.Event()
        self._loop.call_soon_threadsafe(turning.set)
        if turning.wait(patience):
            return True
        self._loop = None
        return False

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


def _begin_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_turn, args=(loop,), name="raftune async rewards", daemon=True).start()
    return loop


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()
