"""Maps every outcome of a command to an exit code, and every error to one or two lines."""

from __future__ import annotations

import contextlib
import difflib
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
from raftune.sanitize import first_line, harmless, shell_command
from raftune.store import interruption

if TYPE_CHECKING:  # `--help` imports neither numpy nor pyarrow
    from raftune.protocols import Callback

INTERRUPTED = Interrupted.exit_code
USAGE = 2


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
        with handling(at_once()):
            result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        return complain(usage_message(error, app, tokens), USAGE)
    except RaftuneError as error:
        if debug:
            raise
        return complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return complain("interrupted; no file was left half written. Run the same command again.", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return complain(unforeseen(error), 1)


def complain(message: str, code: int) -> int:
    """Says on stderr what went wrong, a line for each finding."""
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
    except (ImportError, MemoryError, SystemError):  # no memory is left to say it in colours
        os.write(2, "".join(f"{word}: {line}\n" for line in lines).encode())
    return code


def usage_message(error: CycloptsError, app: App, tokens: list[str]) -> str:
    """What was wrong with the call, and where help is."""
    from cyclopts import MissingArgumentError, UnknownCommandError, UnusedCliTokensError

    words = [token for token in tokens if not token.startswith("-")]
    if words and words[0] not in commands_of(app):
        return no_command(words[0], app)
    place = " ".join(["raftune", *words[:1]])
    if isinstance(error, UnknownCommandError):
        return no_command(words[1], app[words[0]])
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(error.unused_tokens or ())
        return f"{place} takes no further argument; got {extra!r}. `{place} --help` explains it."
    if isinstance(error, MissingArgumentError) and error.argument is not None and not error.tokens_so_far:
        flag = error.argument.field_info.kind is inspect.Parameter.KEYWORD_ONLY
        needed = error.argument.name if flag else error.argument.name.removeprefix("--").upper()
        return f"{place} needs {needed}; got none. `{place} --help` explains it."
    said = str(error).strip().rstrip(".")
    stop = "" if said.endswith("?") else "."
    return f"{said[:1].lower()}{said[1:]}{stop} `{place} --help` explains it."


def unknown_command(app: App, tokens: list[str]) -> str | None:
    """What to say where the first word is no command, whatever follows it: --help must not hide that."""
    if not tokens or tokens[0].startswith("-"):
        return None
    if tokens[0] not in commands_of(app):
        return no_command(tokens[0], app)
    inner = app[tokens[0]]
    if len(tokens) > 1 and not tokens[1].startswith("-") and commands_of(inner) and tokens[1] not in commands_of(inner):
        return no_command(tokens[1], inner)
    return None


# What other tools call it, where the nearest spelling would name another command.
ELSEWHERE = {"status": "runs", "list": "runs", "ls": "runs", "log": "runs", "whatif": "select"}


def no_command(word: str, app: App) -> str:
    known = commands_of(app)
    close = [n for n in [ELSEWHERE.get(word)] if n in known] or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}."
    place = "raftune" if app.name[0] == "raftune" else f"raftune {app.name[0]}"
    return f"{word!r} is not a command of {place}; {hint}"


def commands_of(app: App) -> list[str]:
    return [name for name in app if not name.startswith("-")]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the machine's memory did not suffice."""
    words = ("cannot allocate memory", "can't allocate memory", "not enough memory", "bad_alloc", "start new thread")
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        said = isinstance(error, (RuntimeError, ImportError)) and any(part in str(error).lower() for part in words)
        if isinstance(error, MemoryError) or code == errno.ENOMEM or said:
            return True
        error = error.__cause__ or error.__context__
    return False


def unforeseen(error: Exception) -> str:
    """A line for what no one foresaw: the system's refusal in its own words, anything else as what it is, a bug."""
    if is_out_of_memory(error):
        return f"memory ran out: {first_line(error)}. Use a smaller model or batch, or raise the limit (`ulimit -v`)."
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror}."
    line = (str(error).strip() or "no message").splitlines()[0]
    return f"unexpected {type(error).__name__}: {line} (a bug, here or in code that was called; --debug shows where)."


def at_once() -> Callable[[int, FrameType | None], None]:
    """The handler of a command that has nothing to go on with: the first signal is answered and ends it, where it is;
    the second ends the process at once."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            os.write(2, b"\nstopped at once.\n")
            os._exit(INTERRUPTED)
        os.write(2, b"\nstopping. Once more stops at once.\n")
        raise KeyboardInterrupt

    return stop


GRACE = 8.0  # seconds that a step may take once a stop was asked for; what awaits us may kill after ten


@contextlib.contextmanager
def interruptible(root: Path, again: str | None = None) -> Iterator[Callback]:
    """Turns SIGINT and SIGTERM into Interrupted, which says how to resume; a second signal ends the process at once.

    `again` is what to say of work that is no run: what is kept, and how to go on.

    The first is answered by a line on stderr. Work that saves what it does then goes on to the end of its step, for
    GRACE seconds at most; elsewhere KeyboardInterrupt is raised where the work is: what is written is written
    atomically, so any moment will do. Where foreign code swallows it, the observer that this yields raises at the run's
    next event.
    """
    asked: list[int] = []
    deferred, over, overdue = threading.Event(), threading.Event(), list[bool]()

    def end_late() -> None:
        """On a thread of its own, for a handler of signals may start none."""
        deferred.wait()
        if not over.wait(GRACE):
            overdue.append(True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=end_late, daemon=True).start()
    since = [time.monotonic()]

    def stop(number: int, frame: FrameType | None) -> None:
        if overdue:  # from ourselves: the step takes too long
            overdue.clear()
            raise KeyboardInterrupt
        asked.append(number)
        if len(asked) > 1:
            os.write(2, b"\nstopped at once.\n")
            os._exit(INTERRUPTED)
        os.write(2, f"\n{answer(interruption.ask_to_stop(), time.monotonic() - since[0])}\n".encode())
        if not interruption.in_stretch():
            raise KeyboardInterrupt
        deferred.set()

    def observe(kind: str, facts: dict[str, Any]) -> None:
        since[0] = time.monotonic()
        if asked and not interruption.in_stretch():
            raise KeyboardInterrupt

    def farewell() -> Interrupted:
        resume = shell_command("raftune", "resume", root)
        return Interrupted(again or f"what is committed is kept. Resume with: {resume}")

    interruption.forget()
    try:
        with handling(stop):
            yield observe
    except KeyboardInterrupt:
        raise farewell() from None
    except Exception:
        if asked:
            raise farewell() from None
        raise
    finally:
        over.set()
        deferred.set()
        interruption.forget()


def answer(promise: str | None, seconds: float) -> str:
    """What is said at once to the first signal."""
    again = "Once more stops at once"
    if promise is not None:
        return f"stopping after the current step: {promise}. {again}; then up to a minute of work is lost."
    return f"stopping: what is done is kept, but for the last {seconds:.0f} s of unfinished work. {again}."


@contextlib.contextmanager
def handling(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
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
