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
    """A callback that also keeps the run's page up to date; just the given one where the configuration has it off.

    The page is written when a round that had something to do is over, and at the end.
    """
    if not config.report:
        yield observe
        return
    images: dict[str, EmbeddedImage | None] = {}  # the next page shows most of them again
    num_rounds, stale, warned = 0, False, False

    def write(working: bool) -> None:
        nonlocal stale, warned
        from raftune.report import write_report

        try:
            write_report(root, working=working, made=images)
            stale = False
        except Exception as error:
            if not warned:
                why = f"{type(error).__name__}: {first_line(error)}"
                warnings.warn(f"report.html could not be written, and the run goes on without it: {why}", stacklevel=3)
            warned = True

    def both(kind: str, facts: dict[str, Any]) -> None:
        nonlocal num_rounds, stale
        if kind == "round_begin":
            num_rounds = facts["of"]
        elif kind == "stage_end":
            stale = True
        elif kind == "round_end" and facts["round"] < num_rounds and stale:
            write(working=True)
        elif kind == "end":
            write(working=False)
        observe(kind, facts)  # last: it may end the run

    try:
        yield both
    except KeyboardInterrupt:
        write(working=False)  # else the page that lies there would go on saying that the run is at work
        raise
    except Exception:
        if stale:
            write(working=True)
        raise
