"""Ctrl-C while a trainer works: it leaves the call as KeyboardInterrupt, whatever foreign code makes of it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raftune import interruption

logger = logging.getLogger("raftune")


@contextlib.contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """While the block runs an interrupt is remembered, so that a reward that swallows it cannot turn it into data.

    Training goes on to the end of its optimizer step and keeps it; a second interrupt stops at once. Where the script
    has a handler of its own, and in other threads, nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        first = not interruption.asked()
        promise = interruption.ask_to_stop()
        if not first or promise is None:
            raise KeyboardInterrupt
        logger.warning("Stopping after the current step: %s. Once more stops at once.", promise)

    interruption.forget()
    signal.signal(signal.SIGINT, stop)
    try:
        yield
        interruption.raise_if_asked()
    except Exception:
        interruption.raise_if_asked()
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interruption.forget()
