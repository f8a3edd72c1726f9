"""Saves the progress of an unfinished chunk about once a minute.

A stage with long chunks calls `current()`, loads the state of an earlier attempt, and saves regularly. Work resumed
from it must end in the same bytes. The file lies beside the stage's files until the chunk is committed; its name holds
the chunk, a hash of what shaped the chunk, and a hash of the file itself.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from raftune.store import interruption, pulse
from raftune.store.files import ensure_folder, sha256_hex, sha256_of, sync, unique

SAVE_EVERY = 60.0  # seconds of work that an interrupt may cost
SHARE = 0.05  # of the time, at most, is spent on saving
RATE = 200e6  # bytes per second of a disk, until it was measured
AT_A_STOP = 5.0  # seconds that saving may take when a user waits for the end
VERSION = 2


class SavePace:
    """Decides when to save: once a minute, less often if saving is slow, at once on a stop request."""

    def __init__(self) -> None:
        self.saved = time.monotonic()
        self.rate = RATE

    def due(self, nbytes: Callable[[], int]) -> bool:
        """Whether to save now; `nbytes`, the size of what would be written, is called only where it matters."""
        if interruption.asked():
            return nbytes() / self.rate <= AT_A_STOP
        waited = time.monotonic() - self.saved
        return waited >= SAVE_EVERY and waited >= nbytes() / self.rate / SHARE

    def took(self, seconds: float, nbytes: int) -> None:
        """Records a save of `nbytes`."""
        self.saved = time.monotonic()
        if nbytes >= 10e6:  # less measures only the disk's latency
            self.rate = nbytes / max(seconds, 1e-3)

    def promise(self, nbytes: Callable[[], int]) -> str:
        """What a stop at the next step keeps, in words."""
        if nbytes() / self.rate <= AT_A_STOP:
            return "what is done until then is kept"
        lost = time.monotonic() - self.saved
        return f"the last {lost:.0f} s of work are lost (saving them would take longer), all before is kept"


class PartialWork:
    """The unfinished work of one chunk. Without a folder nothing is found and nothing is saved.

    `check` is called before a state is saved, and raises where nothing may be written any more.
    """

    def __init__(
        self,
        folder: Path | None = None,
        tmp: Path | None = None,
        name: str = "",
        key: str = "",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.tmp, self.name, self.key, self.check = folder, tmp, name, key, check
        self.prefix = f"_part-{name}-{sha256_hex([f'{VERSION} {key}'])[:16]}-"
        self.pace = SavePace()

    def find(self) -> Path | None:
        """The file that an earlier attempt at the same work left, if it is whole."""
        paths = self.folder.glob(f"{self.prefix}*") if self.folder is not None else ()
        return next((path for path in paths if sha256_of(path) == path.name.removeprefix(self.prefix)), None)

    @contextlib.contextmanager
    def work(self, nbytes: Callable[[], int] = lambda: 0) -> Iterator[PartialWork]:
        """Inside the block, a stop waits for the next `step`."""

        def promise() -> str:
            if self.folder is None:
                return "what this step has done is lost, all before it is kept"
            return self.pace.promise(nbytes)

        with interruption.stretch(promise):
            yield self

    def step(
        self,
        write: Callable[[Path], None],
        nbytes: Callable[[], int] = lambda: 0,
        *,
        done: tuple[int, int, str] | None = None,
    ) -> None:
        """A point from which the work can be resumed: saves if that is due, and stops if that was requested.

        `done`: progress to report, as (done, total, unit).
        """
        if done is not None:
            pulse.tell(*done)
        if self.folder is not None and self.pace.due(nbytes):
            self.save(write)
        interruption.raise_if_asked()

    def save(self, write: Callable[[Path], None]) -> None:
        """Saves what `write` writes in place of the previous state; a full disk does not stop the work."""
        assert self.folder is not None and self.tmp is not None
        started = time.monotonic()
        staged = unique(self.tmp)
        try:
            write(staged)
            sync(staged)
            self.check()
            ensure_folder(self.folder)
            size, final = staged.stat().st_size, self.folder / f"{self.prefix}{sha256_of(staged)}"
            staged.replace(final)
        except (OSError, RuntimeError):  # torch raises RuntimeError for a write that failed
            staged.unlink(missing_ok=True)
            self.pace.took(time.monotonic() - started, 0)
            return
        self.pace.took(time.monotonic() - started, size)
        for path in self.folder.glob(f"_part-{self.name}-*"):
            if path != final:
                path.unlink(missing_ok=True)


_current: ContextVar[PartialWork | None] = ContextVar("_current", default=None)


def current(kind: str) -> PartialWork:
    """The unfinished work, of this kind, of the chunk that runs now; outside of a chunk one that saves nothing."""
    chunk = _current.get()
    if chunk is None:
        return PartialWork()
    return PartialWork(chunk.folder, chunk.tmp, f"{chunk.name}-{kind}", chunk.key, chunk.check)


@contextlib.contextmanager
def _set_current(part: PartialWork | None) -> Iterator[None]:
    token = _current.set(part)
    try:
        yield
    finally:
        _current.reset(token)


def outside() -> contextlib.AbstractContextManager[None]:
    """Inside the block, work is not part of the chunk that runs now: nothing is resumed, nothing is saved."""
    return _set_current(None)


@contextlib.contextmanager
def unfinished_work(
    folder: Path,
    tmp: Path,
    chunk: str,
    key: str,
    metadata: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Inside the block, `current()` is the work of this chunk; once it succeeds, its saved states are deleted."""
    with _set_current(PartialWork(folder, tmp, chunk, json.dumps([key, dict(metadata)], sort_keys=True), check)):
        yield
    for path in folder.glob(f"_part-{chunk}-*"):
        path.unlink(missing_ok=True)
