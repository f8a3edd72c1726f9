"""Writes the report after every round. A failure never stops the run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.config.run import RunConfig
from raftune.protocols import Callback
from raftune.sanitize import first_line

if TYPE_CHECKING:
    from raftune.report.pictures import EmbeddedImage


@contextlib.contextmanager
def rewriting(config: RunConfig, root: Path, observe: Callback) -> Iterator[Callback]:
    """An observer that also keeps the run's page up to date; just the given one where the configuration has it off."""
    if not config.report:
        yield observe
        return
    writer = ReportWriter(root)

    def both(kind: str, facts: dict[str, Any]) -> None:
        writer(kind, facts)  # first: an observer may end the run
        observe(kind, facts)

    try:
        yield both
    except KeyboardInterrupt:
        writer.write(working=False)  # else the page that lies there would go on saying that the run is at work
        raise
    except Exception:
        writer.catch_up()
        raise


class ReportWriter:
    """Writes the page when a round that had something to do is over; the last round's page is written at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.of = 0
        self.stale = self.warned = False
        self.made: dict[str, EmbeddedImage | None] = {}  # images: the next page shows most of them again

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "round_begin":
            self.of = facts["of"]
        elif kind == "stage_end":
            self.stale = True
        elif kind == "round_end" and facts["round"] < self.of:
            self.catch_up()
        elif kind == "end":
            self.write(working=False)

    def catch_up(self) -> None:
        """Writes the page if there is something new to show."""
        if self.stale:
            self.write(working=True)

    def write(self, *, working: bool) -> None:
        """Writes the page; what prevents it is said once."""
        from raftune.report import write_report

        try:
            write_report(self.root, working=working, made=self.made)
            self.stale = False
        except Exception as error:
            if not self.warned:
                why = f"{type(error).__name__}: {first_line(error)}"
                warnings.warn(f"report.html could not be written, and the run goes on without it: {why}", stacklevel=2)
            self.warned = True
