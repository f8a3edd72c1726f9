"""Maps every outcome of a command to an exit code, and every error to one or two lines."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError

from raftune.cli.help import explain
from raftune.errors import Interrupted, RaftuneError
from raftune.sanitize import did_you_mean, first_line, harmless, shell_command
from raftune.store import interruption

if TYPE_CHECKING:  # `--help` imports neither numpy nor pyarrow
    from raftune.protocols import Callback

INTERRUPTED = Interrupted.exit_code
USAGE = 2
GRACE = 8.0  # seconds that a step may take after the first signal; a scheduler may kill after ten
Handler = Callable[[int, FrameType | None], None]


def run_command(app: App, tokens: list[str]) -> int:
    """Runs the command that the tokens name and returns its exit code."""
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        Path.cwd()
    except FileNotFoundError:
        return complain("the folder that the command was given in has been deleted. Change to another one: cd.", 1)
    try:
        if unknown := unknown_command(app, tokens):
            return complain(unknown, USAGE)
        explain(app, tokens)
        with handling(stop_at_once()):
            result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return complain(usage_message(error, tokens), USAGE)
    except RaftuneError as error:
        if debug:
            raise
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted; no file was left half written. Run the same command again.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return complain(unforeseen(error), 1)


def complain(message: str, code: int) -> int:
    """Prints what went wrong on stderr, a line for each error, and returns the code."""
    word, style = ("stopped", "bold yellow") if code == INTERRUPTED else ("error", "bold red")
    lines = [harmless(line) for line in message.splitlines() or [""]]
    try:
        from rich.console import Console
        from rich.text import Text

        from raftune.cli.output import fitted, room

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for line in lines:
            first, *others = fitted(line, room(console), len(word) + 2)
            console.print(Text.assemble((f"{word}: ", style), first))
            for part in others:
                console.print(Text(part))
    except (ImportError, MemoryError, SystemError):  # too little memory for colours
        os.write(2, "".join(f"{word}: {line}\n" for line in lines).encode())
    return code


# What other tools call it, where the nearest spelling would name another command.
ELSEWHERE = {"status": "runs", "list": "runs", "ls": "runs", "log": "runs", "whatif": "select"}


def unknown_command(app: App, tokens: list[str]) -> str | None:
    """An error if a word in the place of a command is none. It is checked first, because --help would hide it."""
    command = "raftune"
    for word in tokens:
        names = [name for name in app if not name.startswith("-")]
        if word.startswith("-") or not names:
            return None
        if word not in names:
            synonym = ELSEWHERE.get(word) if ELSEWHERE.get(word) in names else None
            hint = did_you_mean(synonym or word, names, f"there are {', '.join(names)}.", 0.5)
            return f"{word!r} is not a command of {command}; {hint}"
        app, command = app[word], f"{command} {word}"
    return None


def usage_message(error: CycloptsError, tokens: list[str]) -> str:
    from cyclopts import MissingArgumentError, UnusedCliTokensError, ValidationError

    command = " ".join(["raftune", *[token for token in tokens if not token.startswith("-")][:1]])
    message = str(error).strip().rstrip(".")
    message = f"{message[:1].lower()}{message[1:]}{'' if message.endswith('?') else '.'}"
    if isinstance(error, UnusedCliTokensError):
        message = f"{command} takes no further argument; got {' '.join(error.unused_tokens or ())!r}."
    elif isinstance(error, ValidationError) and error.argument is not None:  # "Must be >= 1."
        rule = (
            error.exception_message.rstrip(".").replace(">=", "at least").replace("<=", "at most").replace(">", "above")
        )
        message = f"{error.argument.name} {rule[:1].lower()}{rule[1:]}; got {error.argument.value}."
    elif isinstance(error, MissingArgumentError) and error.argument is not None and not error.tokens_so_far:
        is_flag = error.argument.field_info.kind is inspect.Parameter.KEYWORD_ONLY
        name = error.argument.name if is_flag else error.argument.name.removeprefix("--").upper()
        message = f"{command} needs {name}; got none."
    return f"{message} `{command} --help` explains it."


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that the machine's memory did not suffice."""
    words = ("cannot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc", "start new thread")
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, (RuntimeError, ImportError)) and any(part in str(error).lower() for part in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def unforeseen(error: Exception) -> str:
    """A line for an unexpected error: the system's own words for its errors; anything else is reported as a bug."""
    if is_out_of_memory(error):
        return f"memory ran out: {first_line(error)}. Use a smaller model or batch, or raise the limit (`ulimit -v`)."
    if isinstance(error, OSError) and error.strerror:
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror}."
    line = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {line} (a bug, here or in code that was called; --debug shows where)."


# -- signals -----------------------------------------------------------------------------------------------------------


def stop_at_once() -> Handler:
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        end_at_second(signals)
        os.write(2, b"\nstopping. Once more stops at once.\n")
        raise KeyboardInterrupt

    return stop


def end_at_second(signals: list[int]) -> None:
    if len(signals) > 1:
        os.write(2, b"\nstopped at once.\n")
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def interruptible(root: Path, again: str | None = None) -> Iterator[Callback]:
    """Turns SIGINT and SIGTERM into Interrupted, which says how to resume; a second signal ends the process at once.

    `again` is the message for work that is not a run. Work that saves its steps (`interruption.stretch`) goes on to the
    end of its step, for at most GRACE seconds. Otherwise KeyboardInterrupt is raised at once: files are written
    atomically. If foreign code swallows it, the yielded callback raises at the run's next event.
    """
    message = again or f"what is committed is kept. Resume with: {shell_command('raftune', 'resume', root)}"
    signals: list[int] = []
    deferred, over, overdue = threading.Event(), threading.Event(), list[bool]()
    last_event = [time.monotonic()]

    def interrupt_late() -> None:
        deferred.wait()
        if not over.wait(GRACE):
            overdue.append(True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        if overdue:  # sent by interrupt_late
            overdue.clear()
            raise KeyboardInterrupt
        signals.append(number)
        end_at_second(signals)
        promise, again = interruption.ask_to_stop(), "Once more stops at once"
        if promise is not None:
            words = f"stopping after the current step: {promise}. {again}; then up to a minute of work is lost."
        else:
            seconds = time.monotonic() - last_event[0]
            words = f"stopping: what is done is kept, but for the last {seconds:.0f} s of unfinished work. {again}."
        os.write(2, f"\n{words}\n".encode())
        if not interruption.in_stretch():
            raise KeyboardInterrupt
        deferred.set()

    def observe(kind: str, facts: dict[str, Any]) -> None:
        last_event[0] = time.monotonic()
        if signals and not interruption.in_stretch():
            raise KeyboardInterrupt

    threading.Thread(target=interrupt_late, daemon=True).start()  # now, because a signal handler may start no thread
    interruption.forget()
    try:
        with handling(stop):
            yield observe
    except KeyboardInterrupt:
        raise Interrupted(message) from None
    except Exception:
        if signals:
            raise Interrupted(message) from None
        raise
    finally:
        over.set()
        deferred.set()
        interruption.forget()


@contextlib.contextmanager
def handling(stop: Handler) -> Iterator[None]:
    """Installs the handler for SIGINT and SIGTERM while the block runs; only the main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
