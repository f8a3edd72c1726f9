"""Writes a run as one self-contained HTML page, also after every round while it trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raftune.config.run import RunConfig
from raftune.errors import StoreError
from raftune.protocols import Callback
from raftune.report.collect import ReportData, collect
from raftune.report.images import EmbeddedImage
from raftune.sanitize import first_line
from raftune.store.files import explaining, stage_file

NAME = "report.html"


def write_report(
    root: Path | str,
    out: Path | str | None = None,
    *,
    working: bool | None = None,
    images: dict[str, EmbeddedImage | None] | None = None,
    data: ReportData | None = None,
) -> Path:
    """Writes the run's page (to report.html in the run, or to `out`) and returns its path.

    What is missing or damaged is named on the page. Raises StoreError where the folder holds no run, or the page cannot
    be written. `working` is what the process that holds the run says of itself, `images` what a page has in common
    with the one before: see `collect`, whose result `data` is where there is one already.
    """
    root = Path(root)
    target = Path(out) if out is not None else root / NAME
    content = render(data or collect(root, working=working, images=images)).encode()
    if target.is_dir():
        raise StoreError(f"the report must be a file; {target} is a directory. Name a file in it.")
    with explaining(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with stage_file(root / "tmp" if out is None else target.parent, target) as staged:
            staged.write_bytes(content)
    return target


def render(data: ReportData) -> str:
    """The page of what was collected."""
    from raftune.report.overview import overview
    from raftune.report.page import page
    from raftune.report.provenance import configuration

    return page(data.document, overview(data), configuration(data))


@contextlib.contextmanager
def rewriting(config: RunConfig, root: Path, observe: Callback) -> Iterator[Callback]:
    """A callback that also keeps the run's page up to date; just the given one where the configuration has it off.

    The page of a round that had something to do is written by a thread while the next round generates, from committed
    files only; the last page is complete when this ends.
    """
    if not config.report:
        yield observe
        return
    images: dict[str, EmbeddedImage | None] = {}  # the next page shows most of them again
    num_rounds, stale, warned = 0, False, False
    thread = ThreadPoolExecutor(1, "raftune report")
    page: Future[Path] | None = None

    def write(working: bool) -> None:
        nonlocal stale, page
        finish()
        page = thread.submit(write_report, root, working=working, images=images)
        stale = False

    def finish() -> None:
        """Waits for the page that is being written; an error is a warning, once."""
        nonlocal warned, page
        error, page = page.exception() if page is not None else None, None
        if error is not None and not warned:
            warned = True
            why = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"report.html could not be written, and the run goes on without it: {why}", stacklevel=3)

    def both(kind: str, facts: dict[str, Any]) -> None:
        nonlocal num_rounds, stale
        if kind == "round_begin":
            num_rounds = facts["of"]
        elif kind == "stage_begin" and facts["stage"] == "train":
            finish()  # the end of a round may delete weights and latents
        elif kind == "stage_end":
            stale = True
        elif kind == "round_end" and facts["round"] < num_rounds and stale:
            write(working=True)
        elif kind == "end":
            write(working=False)
            finish()
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
    finally:
        finish()
        thread.shutdown()


__all__ = ["NAME", "ReportData", "collect", "render", "rewriting", "write_report"]
