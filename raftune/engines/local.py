"""Runs chunks in this process or in N worker processes, with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raftune.config.run import EngineConfig
from raftune.engines.pool import FINAL, Reply, WorkerPool, set_aside
from raftune.engines.process import ChildProcess, ProcessDied
from raftune.errors import ConfigError
from raftune.protocols import ChunkedStage, JournalEntry
from raftune.store.interruption import interrupting
from raftune.store.job import Engine, StageJob, run_chunk


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


class WorkerProcess(ChildProcess):
    """A worker process; requests and replies are JSON. Its output is in tmp/ of the run."""

    def __init__(self, root: Path, slot: int, config: EngineConfig, gpu: str | None = None) -> None:
        threads = str(config.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAFTUNE_WORKER": str(slot)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        log = root / "tmp" / f"worker-{slot}.log"
        launch = [part.replace("{slot}", str(slot)) for part in config.launch]
        folder = str(root.resolve() if launch else root)
        super().__init__("raftune.runtime.worker", folder, log=log, environment=environment, launch=launch)

    def request(self, request: dict[str, Any]) -> Reply:
        """The worker's reply. Raises ProcessDied."""
        try:
            reply: Reply = json.loads(self.ask(json.dumps(request).encode()))
        except ProcessDied as death:
            if not self._greeting:
                raise
            lines = self.log.read_text(errors="replace").split("\n") if self.log is not None else []
            last = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise ProcessDied(f"{death.reason} before it answered; {self.log} ends: {last}", death.own) from None
        return reply


class LocalProcesses:
    """Starts `python -m raftune.runtime.worker RUN` here, each on a GPU of its own, or through `engine.launch`."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        self.config, self.root = config, root
        self.gpus: list[str] = []

    def open(self) -> tuple[str, ...]:
        if self.config.launch:
            command = self.config.launch[0]
            if shutil.which(command) is None:
                raise ConfigError(
                    f"engine.launch must begin with a command that can be run; got {command!r}, and there is none. "
                    "Check its name, or give its path."
                )
            return ()
        self.gpus = visible_gpus()
        if 0 < len(self.gpus) < self.config.workers:
            shared = f"engine.workers is {self.config.workers} and there are {len(self.gpus)} GPUs"
            return (f"{shared}: workers share a GPU, and each holds its own copy of the model",)
        return ()

    def start(self, slot: int) -> WorkerProcess:
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        return WorkerProcess(self.root, slot, self.config, gpu)

    def waiting_for(self) -> str:
        log = self.root / "tmp" / "worker-0.log"
        return f"the command of engine.launch may be in a queue ({log} has what it printed). Raise the time, or fix it."

    def close(self) -> None:
        """Does nothing."""


def visible_gpus() -> list[str]:
    """The names that CUDA_VISIBLE_DEVICES has for the GPUs that this process sees; none where torch is not used."""
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in chosen.split(",")] if chosen is not None else [str(i) for i in range(count)]
    return names[:count]


def local_engine(config: EngineConfig, root: Path) -> Engine:
    """This process where it is the only one, else a pool of processes."""
    if config.workers == 1 and not config.launch:
        return InProcessEngine(config)
    return WorkerPool(config, root, LocalProcesses(config, root))
