"""Tells whether this process was asked to stop; nothing is published after that.

Work that saves its progress (`stretch`) stops at its next step (`raise_if_asked`), so that nothing is lost. Anywhere
else the signal handler raises KeyboardInterrupt at once.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

_asked = False  # not an Event: a signal handler must not wait for a lock that the code below it may hold
_stretches: list[Callable[[], str]] = []


def ask_to_stop() -> str | None:
    """Called by the handler of SIGINT and SIGTERM. Returns what will be kept if the work stops at its next step, in
    words; None where it does not stop by itself, and the handler raises KeyboardInterrupt."""
    global _asked
    _asked = True
    if not _stretches:
        return None
    try:
        return _stretches[-1]()
    except Exception:  # the signal may have come between two states of the work
        return "what was saved is kept"


def promise() -> str | None:
    """What is kept if the current work stops at its next step, in words; None where it does not stop by itself."""
    stretches = _stretches[-1:]  # another thread may ask
    return stretches[0]() if stretches else None


def asked() -> bool:
    return _asked


def forget() -> None:
    global _asked
    _asked = False


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt where the process was asked to stop, also where user code swallowed the interrupt."""
    if _asked:
        raise KeyboardInterrupt


def in_stretch() -> bool:
    """Whether the current work stops by itself at its next step."""
    return bool(_stretches)


@contextlib.contextmanager
def stretch(promise: Callable[[], str]) -> Iterator[None]:
    """Work that calls `raise_if_asked` after each step; `promise` says in words what a stop there keeps.

    Does nothing outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _stretches.append(promise)
    try:
        yield
    finally:
        _stretches.pop()


def interrupting(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt, SystemExit or error raised by a signal handler that this error is or came from.

    A script may have a signal handler that raises any error (TimeoutError, an error of a batch system): it is meant
    for the script, and is no failure of the work that it interrupted.
    """
    handlers = {code for number in signal.valid_signals() if (code := _code_of(signal.getsignal(number))) is not None}
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        frames = traceback.walk_tb(link.__traceback__)
        if isinstance(link, KeyboardInterrupt | SystemExit) or any(frame.f_code in handlers for frame, _ in frames):
            return link
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None


def _code_of(handler: Any) -> CodeType | None:
    """The code of a handler that was written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    for function in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004, its code is needed
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            return code
    return None
