"""A reward that runs in a process of its own, seen from here: a hung or dying one costs its call, not the run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, RaftuneError, RewardError
from raftune.records import Status
from raftune.rewards.batch import Batch
from raftune.rewards.outcome import Outcome, one_line, whole
from raftune.rewards.runner import Runner
from raftune.rewards.wire import batch_table, outcome_from, receive, send

LOAD_SECONDS = 300.0


class HostedReward:
    """Started at once, so that a spec which cannot be loaded is known early; restarted after a kill or an exit.

    Raises ConfigError for a wrong spec, RewardError for code that cannot be imported.
    """

    place = "process"

    def __init__(self, spec: RewardSpec, timeout: float) -> None:
        self.spec, self.timeout = spec, timeout
        self._runner = Runner(f"raftune reward {spec.derived_name}")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            facts = self._launch()
        except BaseException:
            self.close()
            raise
        self.name = spec.name or str(facts["name"])
        self.media = frozenset(facts["media"])
        self.fingerprint = str(facts["fingerprint"])
        self.accepts = None if facts["accepts"] is None else frozenset(facts["accepts"])
        self.is_async = bool(facts["is_async"])

    def start(self, batch: Batch) -> Future[Outcome]:
        """Sends the batch; the outcome follows. A process that is gone is first started anew, outside its time."""
        try:
            self._revive()
            rows = batch_table(batch)
        except RaftuneError as error:
            done: Future[Outcome] = Future()
            done.set_result(whole(Status.ERROR, one_line(error), len(batch)))
            return done
        return self._runner.submit(lambda: self._ask(batch, rows))

    def give_up(self, future: Future[Outcome]) -> str:
        """Ends the process that did not answer in time."""
        self._kill()
        with contextlib.suppress(TimeoutError):
            future.result(timeout=10)
        return "its process was ended"

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        """Values as the reward gave them; raises RewardError where it failed."""
        ids = columns.pop("completion_ids", None)
        kept = {name: values for name, values in columns.items() if isinstance(values, list)}
        future = self.start(Batch(prompts, completions, kept, ids))
        try:
            outcome = future.result(timeout=self.timeout)
        except TimeoutError:
            raise RewardError(
                f"reward {self.name!r}: no answer within {self.timeout:g} s; {self.give_up(future)}"
            ) from None
        failed = [p for p in outcome.parts if p.status not in (Status.OK, Status.NOT_APPLICABLE)]
        if failed:
            raise RewardError(f"reward {self.name!r}: {failed[0].detail}")
        return [part.value for part in outcome.parts]

    def close(self) -> None:
        self._kill()
        self._runner.close()

    def _ask(self, batch: Batch, rows: pa.Table) -> Outcome:
        process = self._process
        assert process is not None
        try:
            inbox, outbox = _pipes(process)
            send(outbox, {"state": batch.state, "timeout": self.timeout}, rows)
            return outcome_from(*receive(inbox))
        except (EOFError, OSError):
            return whole(Status.ERROR, f"the reward's process {_how_it_ended(process)}", len(batch))

    def _revive(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        facts = self._launch()
        if facts["fingerprint"] != self.fingerprint:
            self._kill()
            raise RewardError(f"reward {self.name!r}: its code changed while the run was going; start the run again")

    def _launch(self) -> dict[str, Any]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "raftune.rewards.host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C in the terminal is for us, not for the reward
        )
        loading = self._runner.submit(self._introduce)
        try:
            facts = loading.result(timeout=LOAD_SECONDS)
        except TimeoutError:
            self._kill()
            raise RewardError(f"reward {self.spec.spec!r}: loading it took more than {LOAD_SECONDS:g} s") from None
        if "error" in facts:
            self._kill()
            raise (ConfigError if facts["error"] == "ConfigError" else RewardError)(facts["message"])
        return facts

    def _introduce(self) -> dict[str, Any]:
        process = self._process
        assert process is not None
        try:
            inbox, outbox = _pipes(process)
            send(
                outbox,
                {"spec": self.spec.model_dump(mode="json"), "path": [path or str(Path.cwd()) for path in sys.path]},
            )
            return receive(inbox)[0]
        except (EOFError, OSError):
            how = _how_it_ended(process)
            return {"error": "RewardError", "message": f"reward {self.spec.spec!r}: its process {how} while loading"}

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:  # otherwise its id may be another process's by now
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()
        for pipe in _pipes(process):
            with contextlib.suppress(OSError):
                pipe.close()


def _environment() -> dict[str, str]:
    """Ours, with the folder of a raftune that is not installed (a checkout) where Python looks for modules."""
    root = str(Path(__file__).resolve().parents[2])
    if root == sysconfig.get_paths()["purelib"]:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)}


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    """What the process writes, and what it reads."""
    assert process.stdout is not None and process.stdin is not None
    return process.stdout, process.stdin  # type: ignore[return-value]


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.wait()
    return f"exited with code {code}" if code >= 0 else f"was ended by signal {-code}"
