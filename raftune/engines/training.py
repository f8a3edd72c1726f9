"""Starts the processes of one training through torch.distributed.run, watches them, and ends them.

Their standard input is a socket: when it closes, however this process ended, each of them exits. Over it they write
JSON lines: progress, and the report, or an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raftune.engines.pool import error_from
from raftune.engines.process import MARK, end_marked, import_path
from raftune.errors import EngineError
from raftune.protocols import TrainReport
from raftune.store import interruption, pulse

POLL = 0.1  # seconds between two looks at messages, the processes and a request to stop
PATIENCE = 10.0  # seconds in which processes end after the last message
STOP = "stop"  # a file by which the first process learns that a stop was requested
ENTRY = "raftune.runtime.rank"
FROM_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Result = tuple[TrainReport, tuple[str, ...]]


def train_in_processes(
    task: Mapping[str, Any],
    processes: int,
    threads: int,
    log: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """The report and the notes of a training by so many processes on this machine, each with so many CPU threads.

    `task` is what raftune.runtime.rank reads. Where memory runs out, all of them start again in smaller batches. Raises
    the error that one of them met, EngineError where one was ended from outside, KeyboardInterrupt after a stop.
    """
    while True:
        with TrainingProcesses(task, processes, threads, log) as group:
            result = group.watch(progress)
        if result is not None:
            return result


class TrainingProcesses:
    """The processes of one attempt; leaving the block ends them all."""

    def __init__(self, task: Mapping[str, Any], processes: int, threads: int, log: Path) -> None:
        self.count, self.log, self.mark = processes, log, uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="raftune-"))
        self.promise: str | None = None  # what a stop keeps; None where the processes do not stop by themselves
        task = {**task, "folder_of_attempt": str(self.folder), "threads": threads}
        (self.folder / "task.json").write_text(json.dumps(task))
        rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={self.folder / 'rendezvous'}")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *rendezvous),
            *("--rdzv-conf=store_type=file", f"--rdzv-id={self.mark}", "--local-addr=127.0.0.1", "--max-restarts=0"),
            *("-m", ENTRY, str(self.folder / "task.json")),
        ]
        inherited = {name: value for name, value in os.environ.items() if name not in FROM_LAUNCHERS}
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
        only_local = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
        cpu = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.socket, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("wb") as output:
            self.launcher = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                env={**inherited, **only_local, **cpu, **import_path(), MARK: self.mark},
                start_new_session=True,
            )
        self.socket.settimeout(POLL)

    def __enter__(self) -> TrainingProcesses:
        return self

    def __exit__(self, *details: object) -> None:
        self.socket.close()  # upon which the processes exit
        if self.launcher.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()
        end_marked(self.mark)
        shutil.rmtree(self.folder, ignore_errors=True)

    def watch(self, progress: Callable[[int, int], None]) -> Result | None:
        """The result; None where all have to start again. Raises as `train_in_processes`."""
        text, error = b"", None
        with interruption.stretch(lambda: self.promise or "what was saved is kept"):
            while (data := self._read()) != b"":
                if interruption.asked():
                    if self.promise is None:
                        raise KeyboardInterrupt
                    (self.folder / STOP).touch()
                *lines, text = (text + (data or b"")).split(b"\n")
                for message in map(json.loads, lines):
                    self.promise = message.get("promise", self.promise)
                    if "progress" in message:
                        pulse.tell(*message["progress"])
                        progress(*message["progress"][:2])
                    if "report" in message:
                        report = message["report"]
                        return TrainReport(**report | {"losses": tuple(report["losses"])}), tuple(message["notes"])
                    if "again" in message:
                        return None
                    if "stopped" in message:
                        raise KeyboardInterrupt
                    if "error" in message and message["own"]:
                        raise error_from(message)
                    if "error" in message and error is None:  # it may follow from the end of another process
                        error = f"process {message['rank']} failed: {message['kind']}: {message['error']}"
                if self.launcher.poll() is not None and data is None:
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(PATIENCE)
        reason = self._first_death() or error or "they ended without a result"
        raise EngineError(
            f"training needs all of its {self.count} processes; {reason.rstrip('.')}. Run the same command again: "
            f"training continues from its last checkpoint. Their output is in {self.log}."
        )

    def _read(self) -> bytes | None:
        """What was written; empty when all processes have ended, None where there was nothing for a moment."""
        try:
            return self.socket.recv(1 << 16)
        except TimeoutError:
            return None
        except ConnectionError:
            return b""

    def _first_death(self) -> str | None:
        """Which process was ended by a signal, in words, as torch.distributed.run reports it."""
        if (self.launcher.returncode or 0) < 0:
            return f"their launcher was ended by signal {-self.launcher.returncode}"
        found = re.findall(rb"rank\s*: (\d+) .*\n.*exitcode\s*: -(\d+)", self.log.read_bytes())
        for rank, number in found:
            if int(number) != signal.SIGTERM:  # by which the launcher ends the others
                name = signal.Signals(int(number)).name if int(number) in set(signal.Signals) else ""
                return f"process {int(rank)} was ended by signal {int(number)} ({name})"
        return None
