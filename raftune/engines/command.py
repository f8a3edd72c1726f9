"""Runs a foreign program, such as an inference server, as long as this process lives.

The program is the child of a process of raftune's own, which ends it, with all that it started, when its channel
closes: also after a SIGKILL of this process. Run as `python -m raftune.engines.command COMMAND LOG IN OUT`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from raftune.engines.process import CLOSING_SECONDS, ChildProcess, ProcessDied, serve

PATIENCE = 15.0  # seconds for a program to end by itself after a SIGTERM
NOT_STARTED = 127
MOST_BYTES = 4 * 2**20  # of a log, before its older half is dropped
USEFUL = re.compile(r"(?:Error|Exception|error|ERROR)\b.*?:\s+\S")
USELESS = re.compile(r"See (root cause|stack trace) above|Engine core init.* failed|EngineCore (encountered|failed)")


class ForeignProcess(ChildProcess):
    """A program with its output in `log`, of which the last MOST_BYTES are kept. Raises OSError if it cannot start."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.output = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        super().__init__("raftune.engines.command", json.dumps(list(command)), str(log), environment=environment)

    def exit_code(self) -> int | None:
        """The program's exit code; None while it runs. Raises ProcessDied."""
        code: int | None = json.loads(self.ask(b""))
        return code

    def finish(self) -> None:
        """Ends the program, gently at first, and this process's child."""
        with contextlib.suppress(ProcessDied):
            self.ask(b"end")
        self.close(CLOSING_SECONDS)

    def last_error(self) -> str:
        """The last line of the log that names an error, or else its last line."""
        lines = [line.strip() for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        useful = [line for line in lines if USEFUL.search(line) and not USELESS.search(line)]
        return (useful or lines or ["it printed nothing"])[-1]


def main() -> None:
    """Starts the program; replies to each request with its exit code, None while it runs. `end` ends it first."""
    command, log = json.loads(sys.argv[1]), Path(sys.argv[2])
    environment = dict(os.environ)
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)  # it is of this environment
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
    except OSError as error:
        log.write_text(f"{type(error).__name__}: {error}\n")
        process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({NOT_STARTED})"], stdout=subprocess.PIPE)
    else:
        threading.Thread(target=copy_output, args=(process, log), daemon=True).start()

    def end() -> None:
        process.terminate()  # a server removes its shared memory, which a SIGKILL leaves
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)

    for request, reply in serve(end):
        if request == b"end":
            end()
        reply(json.dumps(process.poll()).encode())


def copy_output(process: subprocess.Popen[bytes], log: Path) -> None:
    """Copies what the process prints into the log; of a longer one the older half is dropped."""
    assert process.stdout is not None
    with log.open("r+b") as file:
        while part := os.read(process.stdout.fileno(), 1 << 16):
            if file.tell() + len(part) > MOST_BYTES:
                file.seek(-MOST_BYTES // 2, os.SEEK_END)
                rest = file.read()
                file.seek(0)
                file.write(rest)
                file.truncate()
            file.write(part)
            file.flush()


if __name__ == "__main__":
    main()
