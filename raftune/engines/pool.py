"""Runs chunks on N workers of any kind, each of which answers one request at a time."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import raftune.errors
from raftune.config.run import EngineConfig
from raftune.engines.process import ProcessDied
from raftune.errors import EngineError, OutOfMemory, RaftuneError
from raftune.protocols import ChunkedStage, JournalEntry
from raftune.store.job import StageJob

FINAL = (RaftuneError, OSError, AssertionError)  # what would not go away if the chunk were tried again
CLOSING_SECONDS = 5.0  # in which an idle worker closes its models and rewards
SHAPING = ("raftune", "torch", "transformers")  # the packages whose versions must be the same on all machines
Reply = dict[str, Any]


class Worker(Protocol):
    """A process that runs chunks, here or on another machine. Requests and replies are JSON objects."""

    @property
    def seconds(self) -> float:
        """How long the current request has taken; 0 without one."""
        ...

    def request(self, request: dict[str, Any]) -> Reply:
        """The reply. Raises ProcessDied."""
        ...

    def end(self, reason: str = "") -> None:
        """Ends the worker at once; a thread that waits for a reply gets ProcessDied with this reason."""
        ...

    def close(self, patience: float) -> None:
        """Ends the worker, which may close its models and rewards first if that takes no longer than `patience` s."""
        ...


class Launcher(Protocol):
    """Starts the workers of a pool."""

    def open(self) -> tuple[str, ...]:
        """Called before the first worker is started. Returns notes for the user; raises ConfigError, EngineError."""
        ...

    def start(self, slot: int) -> Worker:
        """A new worker, which need not be ready. Raises OSError."""
        ...

    def waiting_for(self) -> str:
        """What workers that are not ready may be waiting for, and the fix, in words."""
        ...

    def close(self) -> None:
        """Called after the last worker has ended."""
        ...


class WorkerPool:
    """Up to `engine.workers` workers; one that dies is replaced and its chunk tried again."""

    def __init__(self, config: EngineConfig, root: Path, launcher: Launcher) -> None:
        self.config, self.root, self.launcher = config, root, launcher
        self.failed: dict[int, str] = {}
        self.workers: list[Worker | None] = [None] * config.workers
        self.ready: list[Future[Reply]] = [Future() for _ in range(config.workers)]  # replies to the first request
        self.notes: tuple[str, ...] = ()
        self._open = False
        self._devices: dict[str, str] = {}  # the first host of each device
        self._lock = threading.Lock()

    def run(self, job: StageJob, stage: ChunkedStage, chunks: Sequence[int]) -> Iterator[JournalEntry]:
        """The journal entries in the order in which chunks end. If it is left early, chunks under way are ended."""
        self.failed = {}
        if not chunks:
            return
        if not self._open:
            self.notes += self.launcher.open()
            self._open = True
        waiting: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        done: SimpleQueue[tuple[int, int, Reply]] = SimpleQueue()
        over: Future[None] = Future()
        for index in chunks:
            waiting.put((index, 1))

        def serve(slot: int) -> None:
            while not over.done():
                problem = self._ready(slot, job, over)
                if (item := None if over.done() else waiting.get()) is None:
                    return
                done.put((*item, problem or self._run_chunk(slot, job, item[0])))

        slots = range(min(self.config.workers, len(chunks)))
        threads = [threading.Thread(target=serve, args=(slot,), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        limit, remaining, began = self.config.chunk_timeout, len(chunks), time.monotonic()
        try:
            while remaining:
                self._end_late(limit, began)
                try:
                    index, tries, reply = done.get(timeout=1.0 if limit is None else min(1.0, limit / 4))
                except Empty:
                    continue
                if "entry" in reply:
                    remaining -= 1
                    entry = JournalEntry(**reply["entry"])
                    with self._lock:
                        notes, self.notes = self.notes, ()
                    yield replace(entry, notes=(*notes, *entry.notes))
                elif reply["final"]:
                    raise error_from(reply)
                elif tries <= self.config.max_retries:
                    waiting.put((index, tries + 1))
                else:
                    remaining -= 1
                    set_aside(self, job, index, ": ".join(filter(None, (reply["kind"], reply["error"]))))
        finally:
            over.set_result(None)
            while not waiting.empty():
                waiting.get()
            for _ in threads:
                waiting.put(None)
            if remaining:
                for worker in filter(None, self.workers):
                    worker.end("was ended with the run")
            for thread in threads:
                thread.join()
            if remaining:
                self.close()

    def _end_late(self, limit: float | None, began: float) -> None:
        """Ends workers whose chunk takes too long. Raises EngineError if no worker becomes ready."""
        ready = [future.done() for future in self.ready]
        for worker, is_ready in zip(self.workers, ready, strict=True):
            if worker is not None and is_ready and limit is not None and worker.seconds > limit:
                worker.end(f"took more than engine.chunk_timeout = {limit:g} s")
        patience = self.config.start_timeout
        if patience is not None and not any(ready) and time.monotonic() - began > patience:
            raise EngineError(
                f"no worker was ready within engine.start_timeout = {patience:g} s: {self.launcher.waiting_for()}"
            )

    def _ready(self, slot: int, job: StageJob, over: Future[None]) -> Reply | None:
        """Waits until the slot's worker answers, or the stage is over. Returns the error if it cannot be started."""
        worker, ready = self.workers[slot], self.ready[slot]
        if worker is None:
            try:
                worker = self.workers[slot] = self.launcher.start(slot)
            except OSError as error:
                return {"kind": "EngineError", "error": f"no worker could be started: {error}", "final": True}
            ready = self.ready[slot] = Future()
            request = {"start": start_request(job)}
            threading.Thread(target=answer_into, args=(ready, worker, request), daemon=True).start()
        futures: list[Future[Any]] = [ready, over]
        wait(futures, return_when=FIRST_COMPLETED)
        if not ready.done():
            return None
        try:
            reply = ready.result()
        except ProcessDied as death:
            self._close(slot)
            return {"kind": "", "error": f"its worker process {death.reason}", "final": False}
        if "error" in reply:
            self._close(slot)
            return reply
        return self._note_device(reply["host"], reply["device"])

    def _note_device(self, host: str, device: str) -> Reply | None:
        """Notes where workers run on different devices; an error where some have a GPU and others none."""
        with self._lock:
            if device in self._devices:
                return None
            self._devices[device] = host
            other, other_host = next(iter(self._devices.items()))
            if other == device:  # the first
                return None
            if device.startswith("CPU") != other.startswith("CPU"):
                words = f"workers must all have a GPU or none; {host} has {device}, and {other_host} has {other}."
                fix = "Ask for it: engine.resources: {GPU: 1}, or a launcher's own option."
                return {"kind": "EngineError", "error": f"{words} {fix}", "final": True}
            self.notes += (
                f"workers run on different devices ({host}: {device}, {other_host}: {other}): a chunk that is run "
                "again on another need not be the same to the last bit",
            )
        return None

    def _run_chunk(self, slot: int, job: StageJob, index: int) -> Reply:
        worker = self.workers[slot]
        assert worker is not None
        try:
            request = {"round": job.round, "stage": job.stage.name, "chunk": index, "key": job.key}
            return worker.request({**request, "holder": job.run.holder})
        except ProcessDied as death:
            self._close(slot)
            return {"kind": "", "error": f"its worker process {death.reason}", "final": False}

    def rest(self) -> None:
        for slot, worker in enumerate(self.workers):
            try:
                if worker is not None and self.ready[slot].done():
                    worker.request({"rest": True})
            except ProcessDied:
                self._close(slot)

    def close(self) -> None:
        for slot in range(len(self.workers)):
            self._close(slot)
        if self._open:
            self.launcher.close()
            self._open = False

    def _close(self, slot: int) -> None:
        worker, self.workers[slot] = self.workers[slot], None
        if worker is None:
            return
        if self.ready[slot].done():
            worker.close(CLOSING_SECONDS)
        else:
            worker.end()
            wait([self.ready[slot]], timeout=30.0)  # its thread must have left the launcher's library


class HasFailed(Protocol):
    """An engine that notes failed chunks."""

    config: EngineConfig
    failed: dict[int, str]


def set_aside(engine: HasFailed, job: StageJob, index: int, reason: str, error: BaseException | None = None) -> None:
    """Notes the chunk as failed, or raises EngineError, as configured."""
    if engine.config.on_chunk_failure == "stop":
        raise EngineError(
            f"chunk {index} of {job.title} failed {engine.config.max_retries + 1} times: {reason}. Fix the cause and "
            "resume, or set engine.on_chunk_failure: skip to go on without it."
        ) from error
    engine.failed[index] = reason


def answer_into(ready: Future[Reply], worker: Worker, request: dict[str, Any]) -> None:
    """Makes the worker's reply, or its death, the result of `ready`."""
    try:
        ready.set_result(worker.request(request))
    except BaseException as error:
        ready.set_exception(error)


def error_from(reply: Reply) -> RaftuneError:
    """The error that a worker met, of the class that it had there."""
    kind = getattr(raftune.errors, reply["kind"], None)
    if kind is OutOfMemory:
        return OutOfMemory(reply["error"], reply["batch_size"])
    if isinstance(kind, type) and issubclass(kind, RaftuneError):
        return kind(reply["error"])
    return EngineError(f"a worker failed: {reply['kind']}: {reply['error']}. Its log is in tmp/ of the run.")


def start_request(job: StageJob) -> dict[str, Any]:
    """What a worker compares with its own machine before it runs anything."""
    return {"holder": job.run.holder, "host": platform.node(), "versions": versions()}


def versions() -> dict[str, str]:
    """The versions that shape results, without the build of torch."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in SHAPING:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found
