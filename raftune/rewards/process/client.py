"""Client of a reward in its own process. A hang or crash costs one call only.

If the process dies, the batch is sent to a new one: docs/decisions/0030-reward-process-crashes.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.engines.process import ChildProcess, ProcessDied
from raftune.errors import ConfigError, RaftuneError, RewardError
from raftune.protocols import Reward
from raftune.records import ScoreStatus
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import RewardOutcome, one_line, same_for_all
from raftune.rewards.process.executors import Executor, WorkerThread, call, finished, keeps_dying
from raftune.rewards.process.protocol import batch_table, packed, unpacked

LOAD_SECONDS = 300.0


class ProcessReward(Executor, Reward):
    """Started at once, so that a wrong spec is an error early; restarted after a kill or an exit."""

    place = "process"

    def __init__(self, spec: RewardSpec, timeout: float) -> None:
        self.spec, self.timeout = spec, timeout
        self._thread = WorkerThread(f"raftune reward {spec.derived_name}")
        self._process: ChildProcess | None = None
        self._notes: list[str] = []
        try:
            facts = self._launch(first=True)
        except BaseException:
            self.close()
            raise
        self.name = spec.name or str(facts["name"])
        self.media, self.needs = frozenset(facts["media"]), frozenset(facts["needs"])
        self.fingerprint = str(facts["fingerprint"])
        self.accepts = None if facts["accepts"] is None else frozenset(facts["accepts"])
        self.is_async = bool(facts["is_async"])

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        """Sends the batch to the process, or to a new one if it ended. The future raises ProcessDied if it dies.

        Raises RewardError if it cannot be started, or its code has changed.
        """
        if self._process is None or not self._process.alive():
            self._end()
            if self._launch(first=False)["fingerprint"] != self.fingerprint:
                self._end()
                raise RewardError(
                    f"reward {self.name!r}: its code changed while the run was going. Resume with "
                    "`--from score`: all is scored by the code as it is now."
                )
        process = self._process
        assert process is not None
        try:
            rows = batch_table(batch)
        except RaftuneError as error:
            return finished(same_for_all(ScoreStatus.ERROR, one_line(error), len(batch)))
        return self._thread.submit(lambda: self._score(process, batch.state, rows))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        """Ends the process that did not answer in time."""
        self._end()
        return "its process was ended"

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """Values as the reward gave them; raises RewardError if it failed."""
        ids = columns.pop("completion_ids", None)
        lists = {name: values for name, values in columns.items() if isinstance(values, list)}
        outcome = call(self, RewardBatch(prompts, completions, lists, ids), self.timeout)
        for part in outcome.parts:
            if part.status not in (ScoreStatus.OK, ScoreStatus.NOT_APPLICABLE):
                raise RewardError(f"reward {self.name!r}: {part.detail}")
        return [part.value for part in outcome.parts]

    def close(self) -> None:
        self._end()
        self._thread.close()

    def notes(self) -> tuple[str, ...]:
        """Deaths of the process since the last call, each once."""
        notes, self._notes = self._notes, []
        return tuple(notes)

    def died(self, death: ProcessDied) -> None:
        self._notes.append(f"reward {self.name!r}: its process {death.reason}; the batch is asked again")

    def _score(self, process: ChildProcess, state: Mapping[str, Any], rows: pa.Table) -> RewardOutcome:
        header, _ = unpacked(process.ask(packed({"state": state, "timeout": self.timeout}, rows)))
        if "machine" in header:
            process.end()
            raise ProcessDied(f"met a failure of the machine ({header['machine']})", own=False)
        return RewardOutcome.from_dict(header)

    def _launch(self, first: bool) -> dict[str, Any]:
        """Starts a process that loads the reward; returns its name, media, fingerprint and keywords."""
        deaths: list[bool] = []
        paths = [path or str(Path.cwd()) for path in sys.path]
        order = packed({"spec": self.spec.model_dump(mode="json"), "path": paths})
        while True:
            try:
                try:
                    process = self._process = ChildProcess("raftune.rewards.process.server")
                except OSError as error:
                    raise ProcessDied(f"could not be started ({one_line(error)})", own=False) from None
                facts, _ = unpacked(self._thread.submit(partial(process.ask, order)).result(LOAD_SECONDS))
            except TimeoutError:
                self._end()
                raise RewardError(f"reward {self.spec.spec!r}: loading it took more than {LOAD_SECONDS:g} s") from None
            except ProcessDied as death:
                self._end()
                if first and death.own:
                    raise RewardError(f"reward {self.spec.spec!r}: its process {death.reason} while loading") from None
                keeps_dying(self.spec.spec, deaths, ProcessDied(death.reason, own=False))  # it could be loaded before
                continue
            if "error" not in facts:
                return facts
            self._end()
            raise (ConfigError if facts["error"] == "ConfigError" else RewardError)(facts["message"])

    def _end(self) -> None:
        """Ends the process; its channel is closed behind the call that still reads from it, which ends at once."""
        process, self._process = self._process, None
        if process is not None:
            process.end()
            self._thread.submit(process.channel.close)
