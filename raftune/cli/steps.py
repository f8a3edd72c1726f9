"""Progress of work that is no run, on stderr: a bar on a terminal, elsewhere a line for each step."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from raftune.plain import duration
from raftune.progress import bars, moves

QUIET = 30.0  # seconds of one step after which a line says how far it is, where there is no bar


class Steps:
    """`with Steps() as steps: steps.begin("tuning"); steps.advance(3, 100)`."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._bars = bars(self.console) if moves(self.console) else None
        self._task: TaskID | None = None
        self._title, self._began, self._said = "", 0.0, 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, title: str) -> None:
        """The step that is done from now on."""
        self._title = title
        self._began = self._said = time.monotonic()
        if self._bars is None:
            self._print(title)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(title, total=None, worth="", left="")

    def advance(self, done: int, of: int) -> None:
        """So much of the step is done."""
        now = time.monotonic()
        left = (now - self._began) * (of - done) / max(done, 1)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=done, total=of, left=f"about {duration(left)} left")
        elif now - self._said > QUIET:
            self._said = now
            self._print(f"{self._title}: {done:,} of {of:,}, about {duration(left)} left")

    def note(self, words: str) -> None:
        """A line that stays."""
        self._print(words)

    def _print(self, words: str) -> None:
        self.console.print(Text(words, style="dim"), soft_wrap=True)
