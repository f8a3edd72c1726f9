"""Builds HTML. All text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from raftune.sanitize import harmless


def text(value: Any) -> str:
    """The value as HTML text, also fit for an attribute: escaped, with control and direction characters visible."""
    return html.escape(harmless(str(value)), quote=True)


def number(value: float | None, digits: int = 3) -> str:
    """The number with so many decimals, few enough that a person reads it; a dash for none."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e5 or (value and size < 10**-digits / 2):
        written = f"{value:.2e}"
    elif size >= 1000:
        written = f"{value:,.0f}"
    else:
        written = f"{value:.{min(digits, 1 if size >= 100 else 2 if size >= 10 else digits)}f}"
    return written.replace("-", "−")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, label: str, best: int | None = None) -> str:
    """A table that scrolls sideways where it must; the cells are HTML, the first of each row its header.

    `best` is the number of the row that is marked.
    """
    head = "".join(f'<th scope="col"{_right(i)}>{title}</th>' for i, title in enumerate(titles))
    body = "".join(_row(cells, number == best) for number, cells in enumerate(rows))
    return scrolling(label, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scrolling(label: str, inside: str) -> str:
    """What may be wider than the page: it scrolls by itself, also by keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{inside}</div>'


def _row(cells: Sequence[str], best: bool) -> str:
    head, *rest = cells
    listed = "".join(f'<td class="number">{cell}</td>' for cell in rest)
    return f'<tr{" class=" + chr(34) + "best" + chr(34) if best else ""}><th scope="row">{head}</th>{listed}</tr>'


def _right(column: int) -> str:
    return ' class="number"' if column else ""


def folded(summary: str, inside: str) -> str:
    """What is shown on request."""
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def block(name: str, title: str, inside: str) -> str:
    """A part of a screen that links can name."""
    return f'<section class="block" id="{text(name)}"><h2>{text(title)}</h2>{inside}</section>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Key figures: a name, and HTML that says how much."""
    return '<dl class="facts">' + "".join(f"<div><dt>{text(k)}</dt><dd>{v}</dd></div>" for k, v in pairs) + "</dl>"
