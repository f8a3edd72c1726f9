"""Client of a reward in its own process. A hang or crash costs one call only.

If the process dies, the batch is sent to a new one. If the reward ends its process every time, that is an `error`; if
the process is killed from outside (out of memory), the run stops and can be resumed. See
docs/decisions/0030-the-death-of-a-reward-process.md.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import sysconfig
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, RaftuneError, RewardError
from raftune.records import ScoreStatus
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import RewardOutcome, one_line, whole
from raftune.rewards.process.calls import DeathCounter, ProcessDied, call
from raftune.rewards.process.channel import Channel, InvalidFrame
from raftune.rewards.process.protocol import batch_table, outcome_from, packed, unpacked
from raftune.rewards.process.spawn import MARK, OutputForwarder, end_process
from raftune.rewards.process.threads import WorkerThread

LOAD_SECONDS = 300.0
CLOSING_SECONDS = 2.0  # between the end of a process's channel and its own
FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
LIMITS = {signal.SIGXCPU, signal.SIGXFSZ}


class ProcessReward:
    """Started at once, so that a spec which cannot be loaded is known early; restarted after a kill or an exit.

    Raises ConfigError for a wrong spec, RewardError for code that cannot be imported.
    """

    place = "process"

    def __init__(self, spec: RewardSpec, timeout: float) -> None:
        self.spec, self.timeout = spec, timeout
        self._runner = WorkerThread(f"raftune reward {spec.derived_name}")
        self._host: RewardProcess | None = None
        self._notes: list[str] = []
        try:
            facts = self._launch(first=True)
        except BaseException:
            self.close()
            raise
        self.name = spec.name or str(facts["name"])
        self.media = frozenset(facts["media"])
        self.fingerprint = str(facts["fingerprint"])
        self.accepts = None if facts["accepts"] is None else frozenset(facts["accepts"])
        self.is_async = bool(facts["is_async"])

    def start(self, batch: RewardBatch) -> Future[RewardOutcome]:
        """Sends the batch; the outcome follows, or Died. A process that is gone is first started anew.

        Raises RewardError where it cannot be started, or its code is another by now.
        """
        self._revive()
        host = self._host
        assert host is not None
        try:
            rows = batch_table(batch)
        except RaftuneError as error:
            done: Future[RewardOutcome] = Future()
            done.set_result(whole(ScoreStatus.ERROR, one_line(error), len(batch)))
            return done
        return self._runner.submit(lambda: host.ask({"state": batch.state, "timeout": self.timeout}, rows))

    def give_up(self, future: Future[RewardOutcome]) -> str:
        """Ends the process that did not answer in time."""
        self._end()
        return "its process was ended"

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """Values as the reward gave them; raises RewardError where it failed."""
        ids = columns.pop("completion_ids", None)
        kept = {name: values for name, values in columns.items() if isinstance(values, list)}
        outcome = call(self, RewardBatch(prompts, completions, kept, ids), self.timeout)
        failed = [p for p in outcome.parts if p.status not in (ScoreStatus.OK, ScoreStatus.NOT_APPLICABLE)]
        if failed:
            raise RewardError(f"reward {self.name!r}: {failed[0].detail}")
        return [part.value for part in outcome.parts]

    def close(self) -> None:
        self._end()
        self._runner.close()

    def notes(self) -> tuple[str, ...]:
        """Deaths of the process since this was last asked, each once."""
        notes, self._notes = self._notes, []
        return tuple(notes)

    def died(self, death: ProcessDied) -> None:
        self._notes.append(f"reward {self.name!r}: its process {death.how}; the batch is asked again")

    def _revive(self) -> None:
        if self._host is not None and self._host.alive():
            return
        self._end()
        facts = self._launch(first=False)
        if facts["fingerprint"] != self.fingerprint:
            self._end()
            raise RewardError(
                f"reward {self.name!r}: its code changed while the run was going. Resume with "
                "`--from score`: all is scored by the code as it is now."
            )

    def _launch(self, first: bool) -> dict[str, Any]:
        """What there is to know of the reward. One that ends its process when it is first loaded is not tried again."""
        deaths = DeathCounter(self.spec.spec)
        while True:
            try:
                facts = self._load()
            except ProcessDied as death:
                self._end()
                if first and death.own:
                    raise RewardError(f"reward {self.spec.spec!r}: its process {death.how} while loading") from None
                deaths.add(ProcessDied(death.how, own=False), 0)  # it could be loaded before
                continue
            if "error" not in facts:
                return facts
            self._end()
            raise (ConfigError if facts["error"] == "ConfigError" else RewardError)(facts["message"])

    def _load(self) -> dict[str, Any]:
        try:
            host = self._host = RewardProcess()
        except OSError as error:
            raise ProcessDied(f"could not be started ({one_line(error)})", own=False) from None
        path = [path or str(Path.cwd()) for path in sys.path]
        loading = self._runner.submit(lambda: host.load({"spec": self.spec.model_dump(mode="json"), "path": path}))
        try:
            return loading.result(timeout=LOAD_SECONDS)
        except TimeoutError:
            self._end()
            raise RewardError(f"reward {self.spec.spec!r}: loading it took more than {LOAD_SECONDS:g} s") from None

    def _end(self) -> None:
        """Ends the process; its channel is closed behind the call that still reads from it, which ends at once."""
        host, self._host = self._host, None
        if host is not None:
            host.end()
            self._runner.submit(host.channel.close)


class RewardProcess:
    """One process, from its start to its end. Raises OSError where it cannot be started."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._number = 0
        pipes: list[int] = []
        try:
            for _ in range(3):
                pipes += pipe()
            reads, asks, answers, writes, prints, output = pipes
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raftune.rewards.process.server", str(reads), str(writes)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(reads, writes),
                env=_environment() | {MARK: self.mark},
                start_new_session=True,  # a Ctrl-C in the terminal is for us, not for the reward
            )
        except BaseException:
            for descriptor in pipes:
                os.close(descriptor)
            raise
        for descriptor in (reads, writes, output):
            os.close(descriptor)
        self.channel = Channel(answers, asks, self.alive)
        self._output = OutputForwarder(prints)

    def alive(self) -> bool:
        return self.process.poll() is None

    def load(self, order: dict[str, Any]) -> dict[str, Any]:
        """What there is to know of the reward, or why it cannot be loaded. Raises Died."""
        return self._exchange(packed(order))[0]

    def ask(self, header: dict[str, Any], rows: pa.Table) -> RewardOutcome:
        """The outcome of one batch. Raises Died."""
        told, table = self._exchange(packed(header, rows))
        if "machine" in told:
            self.end()
            raise ProcessDied(f"met a failure of the machine ({told['machine']})", own=False)
        return outcome_from(told, table)

    def end(self) -> None:
        """Kills the process and all that it started."""
        end_process(self.process, self.mark)
        self._output.end()

    def _exchange(self, message: memoryview) -> tuple[dict[str, Any], pa.Table]:
        number, self._number = self._number, self._number + 1
        try:
            self.channel.send(number, message)
            return unpacked(self.channel.receive(number))
        except (EOFError, OSError):
            try:
                code = self.process.wait(timeout=CLOSING_SECONDS)
            except subprocess.TimeoutExpired:
                self.end()
                raise ProcessDied("closed the channel of its answers, and was ended", own=True) from None
            raise death_of(code) from None
        except (InvalidFrame, pa.ArrowException, ValueError, KeyError, TypeError):
            self.end()
            raise ProcessDied("wrote into the channel of its answers, and was ended", own=True) from None


def pipe() -> tuple[int, int]:
    """As os.pipe, but never a standard stream's number, where those were closed when Python started."""
    given = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in given]
    for end in given:
        os.close(end)
    return ends[0], ends[1]


def death_of(code: int) -> ProcessDied:
    """How a process ended, by its return code: by its own doing, or by a signal that another one sent."""
    if code >= 0:
        return ProcessDied(f"exited with code {code}", own=True)
    return ProcessDied(f"was ended by signal {-code}{_name_of(-code)}", own=-code in FAULTS | LIMITS)


def _name_of(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""


def _environment() -> dict[str, str]:
    """Ours, with the folder of a raftune that is not installed (a checkout) where Python looks for modules."""
    root = str(Path(__file__).resolve().parents[3])
    if root == sysconfig.get_paths()["purelib"]:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)}
