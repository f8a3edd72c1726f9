"""Processes that answer numbered messages, for workers and rewards: start, channel, end.

A frame that fails a check ends the process, since later replies could be assigned to the wrong request.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import select
import shlex
import signal
import struct
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue

MAGIC = b"raft"
HEAD = struct.Struct("<4sQQII")  # magic, number, length, CRC of the payload, CRC of the fields before
CHECKED = HEAD.size - 4
POLL_MS = 100  # how soon the end of the other process is noticed if something else holds its pipes open
MARK = "RAFTUNE_PROCESS"  # environment variable by which processes that left the group are found
CLOSING_SECONDS = 2.0  # between the end of a process's channel and its own
LONGEST_BANNER = 1 << 20  # bytes that a launcher may print before the child's first words
LOWEST_DESCRIPTOR = 100  # beyond those that code which closes or reuses descriptors by number usually touches
FAULTS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS, signal.SIGTRAP}
LIMITS = {signal.SIGXCPU, signal.SIGXFSZ}


class InvalidFrame(Exception):
    """The other process wrote an invalid or unexpected frame."""


class ProcessDied(Exception):
    """The process died. `own`: caused by its own code, so that a retry would fail again."""

    def __init__(self, reason: str, own: bool) -> None:
        super().__init__(reason)
        self.reason, self.own = reason, own


class Channel:
    """Both directions, over descriptors that the channel owns. `alive` says whether the other process still runs."""

    def __init__(self, inbox: int, outbox: int, alive: Callable[[], bool] = lambda: True) -> None:
        self.inbox, self.outbox = inbox, outbox
        self._alive, self._closed = alive, False
        os.set_blocking(outbox, False)

    def send(self, number: int, payload: bytes | memoryview) -> None:
        """Writes the frame of this number. Raises EOFError or OSError if nobody reads."""
        start = HEAD.pack(MAGIC, number, len(payload), zlib.crc32(payload), 0)[:CHECKED]
        for part in (start + struct.pack("<I", zlib.crc32(start)), payload):
            rest = memoryview(part)
            while rest:
                self._wait(self.outbox, select.POLLOUT)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self.outbox, rest) :]

    def receive(self, number: int) -> bytes:
        """The payload of the frame of this number. Raises EOFError if the other side is gone, else InvalidFrame."""
        head = self._read(HEAD.size)
        magic, received, length, checksum, head_checksum = HEAD.unpack(head)
        if magic != MAGIC or head_checksum != zlib.crc32(head[:CHECKED]) or received != number:
            raise InvalidFrame
        payload = self._read(length)
        if zlib.crc32(payload) != checksum:
            raise InvalidFrame
        return payload

    def skip_to(self, greeting: bytes) -> bytes:
        """What was written before these bytes, which are read too. Raises EOFError, and InvalidFrame after 1 MiB."""
        data = b""
        while not data.endswith(greeting):
            if len(data) > LONGEST_BANNER:
                raise InvalidFrame
            data += self._read(1)
        return data.removesuffix(greeting)

    def close(self) -> None:
        """Closes the descriptors once; later calls do nothing, since the numbers may be reused by then."""
        if not self._closed:
            self._closed = True
            os.close(self.inbox)
            os.close(self.outbox)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._wait(self.inbox, select.POLLIN)
            part = os.read(self.inbox, min(size - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _wait(self, descriptor: int, event: int) -> None:
        """Waits until the descriptor is ready; of an ended process only what is left in the pipe is read."""
        poller = select.poll()
        poller.register(descriptor, event)
        while True:
            ended = not self._alive()
            if poller.poll(0 if ended else POLL_MS):
                return
            if ended:
                raise EOFError


class ChildProcess:
    """`python -m MODULE *arguments IN OUT` in its own session, so that a Ctrl-C in the terminal does not reach it.

    Output goes to the log file, or to our standard error. `launch` is a command that runs the one that follows it,
    perhaps elsewhere (srun, ssh, a container), and passes standard input and output: then these are the channel.
    Raises OSError if it cannot be started.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        launch: Sequence[str] = (),
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.log = log
        self._greeting = greeting_of(self.mark) if launch else b""  # what is still to be read before the first reply
        self.busy_since: float | None = None
        self._number = 0
        self._reason = ""
        self._ended = threading.Event()
        path = import_path()
        added = {**path, **(environment or {}), MARK: self.mark}
        opened: list[int] = []
        try:
            for _ in range(2):
                opened += open_pipe()
            requests, outbox, inbox, replies = opened
            if log is None:
                printed, output = open_pipe()
                opened += printed, output
            else:
                output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                opened.append(output)
            ends = ("0", "1") if launch else (str(requests), str(replies))
            command = [sys.executable, "-m", module, *arguments, *ends]
            if launch:
                search = [path.get("PYTHONPATH") or os.environ.get("PYTHONPATH", ""), str(Path.cwd())]
                variables = {**added, "PYTHONPATH": os.pathsep.join(filter(None, search))}
                command = ["env", *(f"{name}={value}" for name, value in variables.items()), *command]
                if Path(launch[0]).name == "ssh":  # the shell at the other end splits what ssh joins
                    command = [shlex.quote(word) for word in command]
            self.process = subprocess.Popen(
                [*launch, *command],
                stdin=requests if launch else subprocess.DEVNULL,
                stdout=replies if launch else output,
                stderr=output,
                pass_fds=() if launch else (requests, replies),
                env={**os.environ, **added},
                start_new_session=True,
            )
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            raise
        for descriptor in (requests, replies, output):
            os.close(descriptor)
        self.channel = Channel(inbox, outbox, self.alive)
        if log is None:
            forward = threading.Thread(target=forward_output, args=(printed, self._ended), daemon=True)
            forward.start()

    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        """How long the current request has taken; 0 without one."""
        since = self.busy_since
        return 0.0 if since is None else time.monotonic() - since

    def ask(self, request: bytes | memoryview) -> bytes:
        """The reply to one request. Raises ProcessDied; the process has then ended."""
        number, self._number = self._number, self._number + 1
        self.busy_since = time.monotonic()
        try:
            self.channel.send(number, request)
            if self._greeting:
                banner = self.channel.skip_to(self._greeting)
                self._greeting = b""
                if self.log is not None and banner:
                    with self.log.open("ab") as file:
                        file.write(banner)
            return self.channel.receive(number)
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise self._death(self.process.wait(timeout=CLOSING_SECONDS)) from None
            self.end()
            raise ProcessDied("closed the channel of its answers, and was ended", own=True) from None
        except InvalidFrame:
            self.end()
            raise ProcessDied("wrote into the channel of its answers, and was ended", own=True) from None
        finally:
            self.busy_since = None

    def end(self, reason: str = "") -> None:
        """Kills the process, its group, and what left the group but carries the mark (Linux), such as a daemon.

        A thread that waits for a reply gets ProcessDied with this reason.
        """
        self._reason = reason or self._reason
        if self.alive():  # otherwise its id may be another process's by now
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        end_marked(self.mark)
        self._ended.set()

    def close(self, patience: float) -> None:
        """Closes the channel, upon which an idle process exits, or is killed after `patience` seconds."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=patience)
        self.end()

    def _death(self, code: int) -> ProcessDied:
        """How the process ended: by its own doing, or by a signal that another one sent."""
        if self._reason:
            return ProcessDied(self._reason, own=False)
        if code >= 0:
            return ProcessDied(f"exited with code {code}", own=True)
        try:
            name = f" ({signal.Signals(-code).name})"
        except ValueError:
            name = ""
        return ProcessDied(f"was ended by signal {-code}{name}", own=-code in FAULTS | LIMITS)


def greeting_of(mark: str) -> bytes:
    """What a child whose channel is its standard output writes there first, after what its launcher wrote."""
    return f"\nraftune:{mark}\n".encode()


def import_path() -> dict[str, str]:
    """The environment by which a child finds this raftune, also one that is not installed (a checkout)."""
    root = str(Path(__file__).resolve().parents[2])
    if root == sysconfig.get_paths()["purelib"]:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))}


def open_pipe() -> tuple[int, int]:
    """As os.pipe, but never a standard stream's number if those were closed when Python started."""
    ends = os.pipe()
    copies = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends]
    for end in ends:
        os.close(end)
    return copies[0], copies[1]


def end_marked(mark: str) -> None:
    """Kills every process that inherited the mark in its environment, but this one."""
    for _ in range(5):  # a process may start another meanwhile
        pids = [pid for pid in marked(mark) if pid != os.getpid()]
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """The ids of the processes whose environment holds the mark; none without /proc."""
    entry = f"{MARK}={mark}".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
    return pids


def forward_output(descriptor: int, ended: threading.Event) -> None:
    """Passes what a process prints to our standard error, which may be closed, full, or a pager that nobody scrolls.

    After the end what is left in the pipe is still passed on; something else may hold it open for good.
    """
    source, target = select.poll(), select.poll()
    source.register(descriptor, select.POLLIN)
    target.register(2, select.POLLOUT)
    patience = 1000  # milliseconds that a full standard error is waited for, once
    while True:
        last = ended.is_set()
        if not source.poll(0 if last else POLL_MS):
            if last:
                break
            continue
        if not (data := os.read(descriptor, 1 << 16)):
            break
        if sys.stderr is None:  # it was closed when Python started: descriptor 2 may be some other file
            continue
        for start in range(0, len(data), select.PIPE_BUF):  # what a pipe takes at once if it takes anything
            if not target.poll(patience):
                patience = 0
                break
            patience = 1000
            with contextlib.suppress(OSError):
                os.write(2, data[start : start + select.PIPE_BUF])
    os.close(descriptor)


def move_high(descriptor: int) -> int:
    """A copy of the descriptor with a high number, which no child inherits; the descriptor itself is closed."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR)
    os.close(descriptor)
    return copy


def serve(
    before_end: Callable[[], None] = lambda: None,
) -> Iterator[tuple[bytes, Callable[[bytes | memoryview], None]]]:
    """The requests to a child process, each with the function that sends its reply; the last two arguments of the
    process are the channel.

    When it closes, the process ends with all that it started; if it is between two requests, `before_end` is called.
    """
    standard = sys.argv[-2:] == ["0", "1"]
    inbox, outbox = (move_high(int(descriptor)) for descriptor in sys.argv[-2:])
    if standard:  # nothing else may read the one, and what is printed goes to the log
        assert os.open(os.devnull, os.O_RDONLY) == 0
        os.dup2(2, 1)
        os.write(outbox, greeting_of(os.environ.get(MARK, "")))
    channel = Channel(inbox, outbox)
    os.register_at_fork(after_in_child=channel.close)
    requests: SimpleQueue[bytes] = SimpleQueue()
    busy = threading.Event()

    def read() -> None:
        try:
            for number in itertools.count():
                request = channel.receive(number)
                busy.set()
                requests.put(request)
        except (EOFError, OSError, InvalidFrame):
            if not busy.is_set():
                with contextlib.suppress(Exception):
                    before_end()
            end_marked(os.environ.get(MARK, ""))
            if os.getpgrp() == os.getpid():
                os.killpg(os.getpid(), signal.SIGKILL)
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    for number in itertools.count():
        yield requests.get(), partial(channel.send, number)
        busy.clear()
