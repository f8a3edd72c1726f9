"""Reports progress from inside a stage."""

from __future__ import annotations

from typing import NamedTuple


class WorkProgress(NamedTuple):
    """Progress of the current work: done of total."""

    done: int
    of: int
    things: str


_now: WorkProgress | None = None


def tell(done: int, of: int, things: str) -> None:
    """Sets the progress; the work calls it as often as it likes."""
    global _now
    _now = WorkProgress(done, of, things)


def now() -> WorkProgress | None:
    """The latest progress, None where there was none since `clear`."""
    return _now


def clear() -> None:
    """Forgets the progress, when other work starts."""
    global _now
    _now = None
