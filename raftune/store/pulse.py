"""Reports progress from inside a stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkProgress:
    """Progress of the current work: done of total."""

    done: int
    of: int
    things: str


_now: WorkProgress | None = None


def tell(done: int, of: int, things: str) -> None:
    """Called by the work, as often as it likes."""
    global _now
    _now = WorkProgress(done, of, things)


def now() -> WorkProgress | None:
    """The latest word; None where nothing was said since `clear`."""
    return _now


def clear() -> None:
    """Called where other work begins."""
    global _now
    _now = None
