"""Runs chunks in this process or in N local worker processes, with the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import raftune.errors
from raftune.config.extensions import load_extension, register
from raftune.config.run import EngineConfig
from raftune.errors import EngineError, OutOfMemory, RaftuneError
from raftune.protocols import ChunkedStage, JournalEntry
from raftune.store.interruption import interrupting
from raftune.store.job import Engine, StageJob, run_chunk

FINAL = (RaftuneError, OSError, AssertionError)  # what would not go away if the chunk were tried again
Answer = dict[str, Any]


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
                        give_up(self.failed, self.config, job, index, f"{type(error).__name__}: {error}", error)

    def rest(self) -> None:
        """Nothing is held here: the loop's own shelf holds one model at a time."""

    def close(self) -> None:
        """Nothing to end."""


def give_up(
    failed: dict[int, str],
    config: EngineConfig,
    job: StageJob,
    index: int,
    why: str,
    error: BaseException | None = None,
) -> None:
    """Sets the chunk aside, or raises EngineError, as configured."""
    if config.on_chunk_failure == "stop":
        raise EngineError(
            f"chunk {index} of {job.title} failed {config.max_retries + 1} times: {why}. Fix the cause and resume, or "
            "set engine.on_chunk_failure: skip to go on without it."
        ) from error
    failed[index] = why


class WorkerPool:
    """N processes, each `python -m raftune.runtime.worker RUN`; one that dies is started anew, and its unit is tried
    again."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.failed: dict[int, str] = {}
        self.processes: list[WorkerProcess | None] = [None] * config.workers

    def run(self, job: StageJob, stage: ChunkedStage, chunks: Sequence[int]) -> Iterator[JournalEntry]:
        """The journal entries in the order in which units end. What is still going when this is left early, is
        ended.
        """
        self.failed = {}
        waiting: SimpleQueue[tuple[int, int] | None] = SimpleQueue()
        done: SimpleQueue[tuple[int, int, Answer]] = SimpleQueue()
        for index in chunks:
            waiting.put((index, 1))
        slots = range(min(self.config.workers, len(chunks)))
        threads = [threading.Thread(target=self._serve, args=(n, job, waiting, done), daemon=True) for n in slots]
        for thread in threads:
            thread.start()
        left = len(chunks)
        try:
            while left:
                index, tries, answer = self._next(done)
                if "entry" in answer:
                    left -= 1
                    yield JournalEntry(**answer["entry"])
                elif answer["final"]:
                    raise error_from(answer)
                elif tries <= self.config.max_retries:
                    waiting.put((index, tries + 1))
                else:
                    left -= 1
                    why = ": ".join(filter(None, (answer["kind"], answer["error"])))
                    give_up(self.failed, self.config, job, index, why)
        finally:
            while not waiting.empty():
                waiting.get()
            for _ in threads:
                waiting.put(None)
            if left:
                self._kill()
            for thread in threads:
                thread.join()
            if left:
                self.close()

    def _next(self, done: SimpleQueue[tuple[int, int, Answer]]) -> tuple[int, int, Answer]:
        """The next answer; a worker that takes longer than a chunk may is killed, which is an answer too."""
        limit = self.config.chunk_timeout
        while True:
            try:
                return done.get(timeout=None if limit is None else min(1.0, limit / 4))
            except Empty:
                for worker in self.processes:
                    if worker is not None and limit is not None and worker.seconds > limit:
                        worker.kill(f"took more than engine.chunk_timeout = {limit:g} s")

    def _serve(
        self,
        slot: int,
        job: StageJob,
        waiting: SimpleQueue[tuple[int, int] | None],
        done: SimpleQueue[tuple[int, int, Answer]],
    ) -> None:
        while (item := waiting.get()) is not None:
            index, tries = item
            done.put((index, tries, self._ask(slot, job, index)))

    def _ask(self, slot: int, job: StageJob, index: int) -> Answer:
        try:
            worker = self.processes[slot] or WorkerProcess(self.root, slot, self.config)
        except OSError as error:
            return {"kind": "OSError", "error": f"no worker could be started: {error}", "final": True}
        self.processes[slot] = worker
        answer = worker.ask({"round": job.round, "stage": job.stage.name, "chunk": index, "key": job.key})
        if answer is not None:
            return answer
        self.processes[slot] = None
        return {"kind": "", "error": f"its worker process {worker.end()}", "final": False}

    def _kill(self) -> None:
        for worker in self.processes:
            if worker is not None:
                worker.kill("was ended with the run")

    def rest(self) -> None:
        for slot, worker in enumerate(self.processes):
            if worker is not None and worker.ask({"rest": True}) is None:
                worker.end()
                self.processes[slot] = None

    def close(self) -> None:
        for slot, worker in enumerate(self.processes):
            if worker is not None:
                worker.end()
                self.processes[slot] = None


class WorkerProcess:
    """One worker process, asked by a line of JSON and answering with one."""

    def __init__(self, root: Path, slot: int, config: EngineConfig) -> None:
        threads = str(config.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAFTUNE_WORKER": str(slot)}
        self.log = root / "tmp" / f"worker-{slot}.log"
        self.since: float | None = None
        self.killed = ""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raftune.runtime.worker", str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    @property
    def seconds(self) -> float:
        """How long the question that it is at has taken; 0 while it is at none."""
        since = self.since
        return 0.0 if since is None else time.monotonic() - since

    def ask(self, question: dict[str, Any]) -> Answer | None:
        """The worker's answer; None when it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.since = time.monotonic()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (OSError, ValueError):
            return None
        finally:
            self.since = None
        answer: Answer | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def kill(self, why: str) -> None:
        """Ends the process at once; the thread that waits for its answer learns of it."""
        self.killed = why
        self.process.kill()

    def end(self) -> str:
        """Closes the worker's stdin, upon which it exits; one that does not is killed. Says how it ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(OSError):  # it may be gone, and its pipe with it
            self.process.stdin.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        code = self.process.returncode
        return self.killed or (f"exited with code {code}" if code >= 0 else f"was ended by signal {-code}")


def error_from(answer: Answer) -> RaftuneError:
    """The error that a worker met, as the class that it was there."""
    kind = getattr(raftune.errors, answer["kind"], None)
    if kind is OutOfMemory:
        return OutOfMemory(answer["error"], answer["batch_size"])
    if isinstance(kind, type) and issubclass(kind, RaftuneError):
        return kind(answer["error"])
    return EngineError(f"a worker failed: {answer['kind']}: {answer['error']}. Its log is in tmp/ of the run.")


ENGINES: dict[str, Callable[[EngineConfig, Path], Engine]] = {}  # the built-in engines, by engine.kind
METHODS = {"run": ("job", "stage", "chunks"), "rest": (), "close": ()}


@register(ENGINES, "local")
def _local(config: EngineConfig, root: Path) -> Engine:
    return InProcessEngine(config) if config.workers == 1 else WorkerPool(config, root)


def make_engine(config: EngineConfig, root: Path) -> Engine:
    """The configured engine. Raises ConfigError where a custom one is not there, or is not whole."""
    if config.kind in ENGINES:
        return ENGINES[config.kind](config, root)
    made: Engine = load_extension(
        config.kind,
        "engine.kind",
        {},
        "engine.options",
        methods=METHODS,
        attributes=("failed",),
        made_by=lambda cls: cls(config, root),
    )
    return made
