"""Whether this process was asked to stop: after that nothing is published, whatever became of the signal."""

from __future__ import annotations

import threading

_asked = threading.Event()


def ask_to_stop() -> None:
    """Called by the handler of SIGINT and SIGTERM, before it raises KeyboardInterrupt."""
    _asked.set()


def forget() -> None:
    _asked.clear()


def raise_if_asked() -> None:
    """Raises KeyboardInterrupt where the process was asked to stop and code that was called swallowed the interrupt."""
    if _asked.is_set():
        raise KeyboardInterrupt


def caused_by_interrupt(error: BaseException) -> bool:
    """True of KeyboardInterrupt and SystemExit, and of an error raised in place of one."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, KeyboardInterrupt | SystemExit):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False
