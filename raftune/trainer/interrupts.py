"""Raises KeyboardInterrupt on Ctrl-C, whatever libraries do with the signal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from raftune.store import interruption


@contextlib.contextmanager
def leaving_on_interrupt() -> Iterator[None]:
    """While the block runs an interrupt is remembered, so that a reward that swallows it cannot turn it into data.

    Training goes on to the end of its optimizer step and saves it; a second interrupt stops at once. Where the script
    has a handler of its own, and in other threads, nothing is changed.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        first = not interruption.asked()
        promise = interruption.ask_to_stop()
        if not first or promise is None:
            raise KeyboardInterrupt
        # no logger: a signal handler takes no lock
        os.write(2, f"\nstopping after the current step: {promise}. Once more stops at once.\n".encode())

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
