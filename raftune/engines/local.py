"""Units in this process, or in N worker processes of this machine: the bytes are the same."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import raftune.errors
from raftune.config.run import EngineConfig
from raftune.errors import EngineError, RaftuneError
from raftune.protocols import Receipt, UnitStage
from raftune.store.job import Engine, Job, receipt_of, run_unit


class ThisProcess:
    """One unit after another, here."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.failed: dict[int, str] = {}

    def run(self, job: Job, stage: UnitStage, units: Sequence[int]) -> Iterator[Receipt]:
        self.failed = {}
        for index in units:
            for tries in range(1, self.config.max_retries + 2):
                try:
                    yield run_unit(job, stage, index)
                    break
                except (RaftuneError, OSError, AssertionError):
                    raise
                except Exception as error:
                    if tries > self.config.max_retries:
                        give_up(self.failed, self.config, job, index, f"{type(error).__name__}: {error}", error)

    def rest(self) -> None:
        """Nothing is held here: the loop's own shelf holds one model at a time."""

    def close(self) -> None:
        """Nothing to end."""


def give_up(
    failed: dict[int, str], config: EngineConfig, job: Job, index: int, why: str, error: BaseException | None = None
) -> None:
    """Sets the unit aside, or raises EngineError, as configured."""
    if config.on_unit_failure == "stop":
        raise EngineError(
            f"unit {index} of {job.title} failed {config.max_retries + 1} times: {why}. Mend the cause and resume, or set "
            "engine.on_unit_failure: skip to go on without it."
        ) from error
    failed[index] = why


class Workers:
    """N processes, each `python -m raftune.worker RUN`; one that dies is started anew, and its unit is tried again."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.failed: dict[int, str] = {}
        self.processes: list[Worker | None] = [None] * config.workers

    def run(self, job: Job, stage: UnitStage, units: Sequence[int]) -> Iterator[Receipt]:
        self.failed = {}
        waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, int, dict[str, Any] | None]] = queue.SimpleQueue()
        for index in units:
            waiting.put((index, 1))
        threads = [
            threading.Thread(target=self._serve, args=(slot, job, waiting, done), daemon=True)
            for slot in range(self.config.workers)
        ]
        for thread in threads:
            thread.start()
        left = len(units)
        try:
            while left:
                index, tries, answer = done.get()
                if answer is None and tries <= self.config.max_retries:
                    waiting.put((index, tries + 1))
                    continue
                left -= 1
                if answer is None:
                    give_up(self.failed, self.config, job, index, "its worker process died")
                elif "error" in answer:
                    raise error_from(answer)
                else:
                    receipt = receipt_of(job, index)
                    assert receipt is not None
                    yield Receipt(
                        index, receipt.file, receipt.rows, receipt.sha256, answer["seconds"], tuple(answer["notes"])
                    )
        finally:
            for _ in threads:
                waiting.put(None)

    def _serve(self, slot: int, job: Job, waiting: queue.SimpleQueue[Any], done: queue.SimpleQueue[Any]) -> None:
        while (item := waiting.get()) is not None:
            index, tries = item
            worker = self.processes[slot] or Worker(self.root, slot, self.config)
            self.processes[slot] = worker
            answer = worker.ask({"round": job.round, "stage": job.stage.name, "unit": index, "key": job.key})
            if answer is None:
                worker.end()
                self.processes[slot] = None
            done.put((index, tries, answer))

    def rest(self) -> None:
        for worker in self.processes:
            if worker is not None:
                worker.ask({"rest": True})

    def close(self) -> None:
        for slot, worker in enumerate(self.processes):
            if worker is not None:
                worker.end()
                self.processes[slot] = None


class Worker:
    """One worker process, asked by a line of JSON and answering with one."""

    def __init__(self, root: Path, slot: int, config: EngineConfig) -> None:
        threads = str(config.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAFTUNE_WORKER": str(slot)}
        self.log = root / "tmp" / f"worker-{slot}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raftune.worker", str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's answer; None when it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (OSError, ValueError):
            return None
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def end(self) -> None:
        """Closes the worker's stdin, upon which it exits; one that does not is killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def error_from(answer: dict[str, Any]) -> RaftuneError:
    """The error that a worker met, as the class that it was there."""
    kind = getattr(raftune.errors, answer["kind"], None)
    if isinstance(kind, type) and issubclass(kind, RaftuneError) and kind is not raftune.errors.OutOfMemory:
        return kind(answer["error"])
    return EngineError(f"a worker failed: {answer['kind']}: {answer['error']}. Its log is in tmp/ of the run.")


def make_engine(config: EngineConfig, root: Path) -> Engine:
    return ThisProcess(config) if config.workers == 1 else Workers(config, root)
