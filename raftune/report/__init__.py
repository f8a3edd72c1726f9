"""Writes a run as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from raftune.errors import StoreError
from raftune.report.collect import ReportData, collect
from raftune.store.files import explaining, stage_file

if TYPE_CHECKING:
    from raftune.report.pictures import EmbeddedImage

NAME = "report.html"


def write_report(
    root: Path | str,
    out: Path | str | None = None,
    *,
    working: bool | None = None,
    made: dict[str, EmbeddedImage | None] | None = None,
    found: ReportData | None = None,
) -> Path:
    """Writes the run's page (to report.html in the run, or to `out`) and returns its path.

    What is missing or damaged is named on the page. Raises StoreError where the folder holds no run, or the page cannot
    be written. `working` is what the process that holds the run says of itself, `made` what a page has in common with
    the one before: see `collect`, whose result `found` is where there is one already.
    """
    root = Path(root)
    target = Path(out) if out is not None else root / NAME
    content = render(found or collect(root, working=working, made=made)).encode()
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


__all__ = ["NAME", "ReportData", "collect", "render", "write_report"]
