"""Starts processes for user code, and ends them with all their children."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

MARK = "RAFTUNE_REWARD_PROCESS"
PASSES = 5  # a process may start another while we look
CHUNK = select.PIPE_BUF  # what a pipe takes at once where it takes anything
PATIENCE_MS = 1000


def end_process(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kills the process, its process group, and what left the group but carries the mark (Linux), such as a daemon."""
    if process.poll() is None:  # otherwise its id may be another process's by now
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_marked(mark)


def end_marked(mark: str) -> None:
    """Kills every process that inherited the mark in its environment, but this one."""
    for _ in range(PASSES):
        found = [pid for pid in marked(mark) if pid != os.getpid()]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """The ids of the processes whose environment holds the mark; none where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


class OutputForwarder:
    """Reads what a process prints and passes it on to our standard error, as long as that takes it.

    Our own standard error may be closed, full, or a pager that nobody scrolls: the process must not notice.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ended = threading.Event()
        self._patience = PATIENCE_MS
        threading.Thread(target=self._forward, name="raftune reward output", daemon=True).start()

    def end(self) -> None:
        """What lies in the pipe is still passed on; something else may hold it open for good."""
        self._ended.set()

    def _forward(self) -> None:
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        while True:
            ended = self._ended.is_set()
            if poller.poll(0 if ended else 100):
                if not (data := os.read(self._descriptor, 1 << 16)):
                    break
                self._write(data)
            elif ended:
                break
        os.close(self._descriptor)

    def _write(self, data: bytes) -> None:
        if sys.stderr is None:  # it was closed when Python started: descriptor 2 may be some other file
            return
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        for start in range(0, len(data), CHUNK):
            if not poller.poll(self._patience):
                self._patience = 0  # it was waited for once
                return
            self._patience = PATIENCE_MS
            with contextlib.suppress(OSError):
                os.write(2, data[start : start + CHUNK])
