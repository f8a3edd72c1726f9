"""Runs chunks in this process or in N local worker processes, with the same bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import raftune.errors
from raftune.config.extensions import load_extension, register
from raftune.config.run import EngineConfig
from raftune.engines.process import ChildProcess, ProcessDied
from raftune.errors import EngineError, OutOfMemory, RaftuneError
from raftune.protocols import ChunkedStage, JournalEntry
from raftune.store.interruption import interrupting
from raftune.store.job import Engine, StageJob, run_chunk

FINAL = (RaftuneError, OSError, AssertionError)  # what would not go away if the chunk were tried again
CLOSING_SECONDS = 5.0  # in which an idle worker closes its models and rewards
Reply = dict[str, Any]


class InProcessEngine:
    """Runs chunks one after another in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.failed: dict[int, str] = {}

    def run(self, job: StageJob, stage: ChunkedStage, chunks: Sequence[int]) -> Iterator[JournalEntry]:
        self.failed = {}
        for index in chunks:
            for tries in range(1, self.config.max_retries + 2):
                try:
                    yield run_chunk(job, stage, index)
                    break
                except FINAL:
                    raise
                except Exception as error:
                    if interrupting(error) is not None:
                        raise
                    if tries > self.config.max_retries:
                        set_aside(self, job, index, f"{type(error).__name__}: {error}", error)

    def rest(self) -> None:
        """Does nothing: the policies of the loop's process hold one model at a time."""

    def close(self) -> None:
        """Does nothing."""


class WorkerPool:
    """N processes, each `python -m raftune.runtime.worker RUN`; one that dies is replaced and its chunk tried again."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.failed: dict[int, str] = {}
        self.processes: list[WorkerProcess | None] = [None] * config.workers

    def run(self, job: StageJob, stage: ChunkedStage, chunks: Sequence[int]) -> Iterator[JournalEntry]:
        """The journal entries in the order in which chunks end. If it is left early, chunks under way are ended."""
        self.failed = {}
        waiting: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        done: SimpleQueue[tuple[int, int, Reply]] = SimpleQueue()
        for index in chunks:
            waiting.put((index, 1))

        def serve(slot: int) -> None:
            while (item := waiting.get()) is not None:
                done.put((*item, self._run_chunk(slot, job, item[0])))

        slots = range(min(self.config.workers, len(chunks)))
        threads = [threading.Thread(target=serve, args=(slot,), daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        limit, remaining = self.config.chunk_timeout, len(chunks)
        try:
            while remaining:
                for worker in self.processes:
                    if worker is not None and limit is not None and worker.seconds > limit:
                        worker.end(f"took more than engine.chunk_timeout = {limit:g} s")
                try:
                    index, tries, reply = done.get(timeout=None if limit is None else min(1.0, limit / 4))
                except Empty:
                    continue
                if "entry" in reply:
                    remaining -= 1
                    yield JournalEntry(**reply["entry"])
                elif reply["final"]:
                    raise error_from(reply)
                elif tries <= self.config.max_retries:
                    waiting.put((index, tries + 1))
                else:
                    remaining -= 1
                    set_aside(self, job, index, ": ".join(filter(None, (reply["kind"], reply["error"]))))
        finally:
            while not waiting.empty():
                waiting.get()
            for _ in threads:
                waiting.put(None)
            for worker in self.processes if remaining else ():
                if worker is not None:
                    worker.end("was ended with the run")
            for thread in threads:
                thread.join()
            if remaining:
                self.close()

    def _run_chunk(self, slot: int, job: StageJob, index: int) -> Reply:
        try:
            worker = self.processes[slot] = self.processes[slot] or WorkerProcess(self.root, slot, self.config)
            return worker.request({"round": job.round, "stage": job.stage.name, "chunk": index, "key": job.key})
        except OSError as error:
            return {"kind": "OSError", "error": f"no worker could be started: {error}", "final": True}
        except ProcessDied as death:
            self._close(slot)
            return {"kind": "", "error": f"its worker process {death.reason}", "final": False}

    def rest(self) -> None:
        for slot, worker in enumerate(self.processes):
            try:
                if worker is not None:
                    worker.request({"rest": True})
            except ProcessDied:
                self._close(slot)

    def close(self) -> None:
        for slot in range(len(self.processes)):
            self._close(slot)

    def _close(self, slot: int) -> None:
        worker, self.processes[slot] = self.processes[slot], None
        if worker is not None:
            worker.close(CLOSING_SECONDS)


class WorkerProcess(ChildProcess):
    """A worker process; requests and replies are JSON. Its output is in tmp/ of the run."""

    def __init__(self, root: Path, slot: int, config: EngineConfig) -> None:
        threads = str(config.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAFTUNE_WORKER": str(slot)}
        log = root / "tmp" / f"worker-{slot}.log"
        super().__init__("raftune.runtime.worker", str(root), log=log, environment=environment)

    def request(self, request: dict[str, Any]) -> Reply:
        """The worker's reply. Raises ProcessDied."""
        reply: Reply = json.loads(self.ask(json.dumps(request).encode()))
        return reply


def set_aside(
    engine: InProcessEngine | WorkerPool, job: StageJob, index: int, reason: str, error: BaseException | None = None
) -> None:
    """Notes the chunk as failed, or raises EngineError, as configured."""
    if engine.config.on_chunk_failure == "stop":
        raise EngineError(
            f"chunk {index} of {job.title} failed {engine.config.max_retries + 1} times: {reason}. Fix the cause and "
            "resume, or set engine.on_chunk_failure: skip to go on without it."
        ) from error
    engine.failed[index] = reason


def error_from(reply: Reply) -> RaftuneError:
    """The error that a worker met, of the class that it had there."""
    kind = getattr(raftune.errors, reply["kind"], None)
    if kind is OutOfMemory:
        return OutOfMemory(reply["error"], reply["batch_size"])
    if isinstance(kind, type) and issubclass(kind, RaftuneError):
        return kind(reply["error"])
    return EngineError(f"a worker failed: {reply['kind']}: {reply['error']}. Its log is in tmp/ of the run.")


ENGINES: dict[str, Callable[[EngineConfig, Path], Engine]] = {}  # the built-in engines, by engine.kind
METHODS = {"run": ("job", "stage", "chunks"), "rest": (), "close": ()}


@register(ENGINES, "local")
def local_engine(config: EngineConfig, root: Path) -> Engine:
    return InProcessEngine(config) if config.workers == 1 else WorkerPool(config, root)


def make_engine(config: EngineConfig, root: Path) -> Engine:
    """The configured engine. Raises ConfigError if a custom one does not exist or lacks a method."""
    if config.kind in ENGINES:
        return ENGINES[config.kind](config, root)

    def build(cls: type[Any]) -> Any:
        return cls(config, root)

    engine: Engine = load_extension(
        config.kind, "engine.kind", {}, "engine.options", methods=METHODS, attributes=("failed",), made_by=build
    )
    return engine
