"""Tells whether this process was asked to stop; nothing is published after that.

Work that saves what it has done (`stretch`) stops by itself at its next step (`raise_if_asked`), so that nothing is
lost. Anywhere else the handler of the signal raises KeyboardInterrupt at once.
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

_asked = False  # no Event: a handler of signals must not wait for a lock that the code under it may hold
_stretches: list[Callable[[], str]] = []


def ask_to_stop() -> str | None:
    """Called by the handler of SIGINT and SIGTERM. What the work under way will keep, in words, if it stops by itself
    at its next step; else None, and the handler raises KeyboardInterrupt."""
    global _asked
    _asked = True
    if not _stretches:
        return None
    try:
        return _stretches[-1]()
    except Exception:  # asked from a signal handler, the work may be between two states
        return "what was saved is kept"


def asked() -> bool:
    return _asked


def forget() -> None:
    global _asked
    _asked = False


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt where the process was asked to stop and code that was called swallowed the interrupt,
    or where work stops by itself."""
    if _asked:
        raise KeyboardInterrupt


def in_stretch() -> bool:
    """Whether the work under way stops by itself at its next step."""
    return bool(_stretches)


@contextlib.contextmanager
def stretch(promise: Callable[[], str]) -> Iterator[None]:
    """Work that calls `raise_if_asked` after each of its steps; `promise` says in words what a stop there keeps.

    Only the main thread hears signals: elsewhere this does nothing.
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
    """The KeyboardInterrupt, the SystemExit or the error of a signal handler's own that this one is or came from.

    A script may have a handler that raises what it likes (TimeoutError, an error of a batch system): that is meant for
    the script, and is no failure of the work that it broke into.
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
    for function in (handler, getattr(type(handler), "__call__", None)):  # noqa: B004, its code is asked for
        if isinstance(code := getattr(function, "__code__", None), CodeType):
            return code
    return None
