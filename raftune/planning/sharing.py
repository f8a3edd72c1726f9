"""How a run's chunks are shared among workers and its training among processes: what that makes of time and memory."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from raftune.config.run import RunConfig
from raftune.engines.local import visible_gpus
from raftune.policies.footprint import ADAM, Footprint, RoundAmounts
from raftune.runtime.distributed import process_count
from raftune.sanitize import counted, megabytes


@dataclass(frozen=True)
class Sharing:
    """`chunks` of a round go to `workers`; `at_once` of these compute at the same time without sharing a GPU or cores.

    `elsewhere`: on hardware that this process does not see. `gpus`: those that it sees; 0 where the policy is on a CPU.
    `processes` train together, in the way `parallel`.
    """

    kind: str
    workers: int
    chunks: int
    at_once: int
    gpus: int
    elsewhere: bool
    processes: int
    parallel: str

    @classmethod
    def of(cls, config: RunConfig, planned: RoundAmounts, device: str) -> Sharing:
        """The shares of this run, whose policy is on this device."""
        engine, cores = config.engine, os.cpu_count() or 1
        chunks = max(1, math.ceil(planned.prompts / config.sampling.chunk_size))
        elsewhere = engine.kind != "local" or bool(engine.launch)
        gpus = len(visible_gpus()) if device.startswith("cuda") else 0
        here = engine.workers if elsewhere else gpus or max(1, cores // engine.threads)
        at_once, training = min(engine.workers, here), config.training
        return Sharing(
            engine.kind, engine.workers, chunks, at_once, gpus, elsewhere, process_count(config), training.parallel
        )

    @property
    def times(self) -> float:
        """How many times as fast as one worker they are at best: all wait for the last chunk."""
        return self.chunks / math.ceil(self.chunks / min(self.at_once, self.chunks))

    @property
    def training_times(self) -> int:
        """How many times as fast as one process all of them train at best: on a CPU they share the cores."""
        return self.processes if self.gpus else 1

    def describe_training(self, peak: int | None, model: Footprint) -> str:
        """In words; `peak`: bytes at which one process alone would train, where they are known."""
        holds = "each with a shard of the model" if self.parallel == "fsdp" else "each with the whole model"
        words = f"{counted(self.processes, 'process')} ({self.parallel}), {holds}"
        if peak is None:
            return words
        if self.parallel == "fsdp":
            peak -= int((model.held + model.saved * (1 + ADAM)) * (1 - 1 / self.processes))
        total, holder = (peak, "a GPU") if self.gpus else (peak * self.processes, "all together")
        return f"{words}; training, {holder}: {megabytes(max(0, total))} at most"

    def describe(self, peak: int | None) -> str:
        """In words; `peak`: bytes that one worker takes to generate, where they are known."""
        work = f"{self.workers} of engine.kind {self.kind}, {counted(self.chunks, 'chunk')} a round"
        place = "one each on" if self.at_once == self.workers else "sharing"
        if self.elsewhere:
            where = "each with what its node has"
        elif self.gpus:
            where = f"{place} {counted(min(self.gpus, self.workers), 'GPU')}"
        else:
            where = "each on cores of its own" if self.at_once == self.workers else "sharing the cores"
        if peak is None:
            return f"{work}; {where}"
        alike = math.ceil(self.workers / self.gpus) if self.gpus else self.workers
        holder = "a worker" if self.elsewhere else "a GPU" if self.gpus else "all together"
        return f"{work}; {where}; generating, {holder}: {megabytes(peak * (1 if self.elsewhere else alike))}"

    def remarks(self, config: RunConfig, prompts: int) -> list[str]:
        """Notes on workers that have nothing to do or slow each other down."""
        notes, cores = [], os.cpu_count() or 1
        if self.workers > self.chunks:
            size, idle = config.sampling.chunk_size, self.workers - self.chunks
            notes.append(
                f"engine.workers is {self.workers} and a round has {counted(self.chunks, 'chunk')} of {size} prompts: "
                f"{counted(idle, 'worker')} will have nothing to do. Write sampling.chunk_size: "
                f"{max(1, prompts // self.workers)}"
            )
        if not self.elsewhere and not self.gpus and self.at_once < self.workers:
            notes.append(
                f"{self.workers} workers of {config.engine.threads} threads share {counted(cores, 'core')}: write "
                f"engine.threads: {max(1, cores // self.workers)}"
            )
        return notes
