"""Prints plain lines and tables, with control characters removed."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from raftune.sanitize import harmless

NO_BREAK = "\ue000"  # stands for a blank inside a quoted command while a line is broken
COMMAND = re.compile(r"(?:^| {2}|: )raftune ")
HEAD = re.compile(r" *(?:\S+(?: \S+)? {2,})?")  # an indent, and the word that names what the line says
NARROW = 20  # columns that a table's last column must have; with less the table is stacked


class OutputConsole(Console):
    """A console that raises if its reader has closed the pipe; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """The console for results: no markup, no highlighting; lines stay whole unless it is a terminal."""
    return OutputConsole(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def json_line(row: Mapping[str, Any]) -> str:
    """The row as JSON; null stands for a number that is not finite, which JSON has not."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None), ensure_ascii=False)


def echo(*lines: str, style: str = "") -> None:
    """Prints lines without control characters; on a terminal they are broken between words."""
    console = out()
    for line in lines:
        for part in fitted(harmless(line), room(console)):
            console.print(Text(part, style=style))


def room(console: Console) -> int | None:
    """The columns of the terminal; None if it is none, and lines stay whole."""
    return console.width if console.is_terminal else None


def fitted(line: str, width: int | None, begin: int = 0) -> list[str]:
    """Breaks the line between words to at most `width` columns, of which the first line has used `begin`.

    Later lines are indented below the text after the first word. A command stays whole, so that it can be pasted.
    """
    if width is None or cell_len(line) + begin <= width or COMMAND.search(line):
        return [line]
    head = HEAD.match(line)
    indent = begin + min(len(head[0]) if head else 0, width // 2)
    unbroken = re.sub(r"`[^`]*`", lambda quoted: quoted[0].replace(" ", NO_BREAK), line)
    lines = textwrap.wrap(
        unbroken,
        width,
        initial_indent=" " * begin,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part[begin if i == 0 else 0 :].replace(NO_BREAK, " ") for i, part in enumerate(lines)] or [""]


class PlainTable:
    """A table without borders, easy to read and to cut with awk. `right`: columns that are aligned to the right."""

    def __init__(self, *titles: str, right: Collection[int] = ()) -> None:
        self.rows: list[list[tuple[str, str]]] = [[(title, "bold") for title in titles]] if titles else []
        self.right = right

    def add(self, *cells: str | tuple[str, str]) -> None:
        """Adds a row; a cell is a text, or a text with a style."""
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        self.rows.append([(harmless(text), style) for text, style in pairs])

    def show(self) -> None:
        console = out()
        for line in self.lines(room(console)):
            console.print(line)

    def lines(self, width: int | None = None) -> list[Text]:
        if not self.rows:
            return []
        widths = [max(cell_len(text) for text, _ in column) for column in zip(*self.rows, strict=True)]
        begin = sum(widths[:-1]) + 2 * (len(widths) - 1)
        if width is None or begin + widths[-1] <= width:
            return [self._line(row, widths) for row in self.rows]
        if len(widths) - 1 in self.right or width - begin < NARROW:
            return self._stacked(width)
        lines = []
        for *cells, (text, style) in self.rows:
            first, *others = fitted(text, width - begin)
            lines.append(self._line([*cells, (first, style)], [*widths[:-1], 0]))
            lines += [Text(" " * begin + part, style=style) for part in others]
        return lines

    def _stacked(self, width: int) -> list[Text]:
        """Each row as its first cell and, below it, each other cell after its title."""
        (_, *titles), *rows = self.rows
        margin = max((cell_len(title) for title, _ in titles), default=0)
        lines = []
        for (head, style), *cells in rows:
            lines.append(Text(head, style=style or "bold"))
            for (title, _), (text, text_style) in zip(titles, cells, strict=True):
                if text:
                    first, *others = fitted(text, max(width - margin - 4, NARROW))
                    lines.append(Text(f"  {title.strip():<{margin}}  ") + Text(first, style=text_style))
                    lines += [Text(" " * (margin + 4) + part, style=text_style) for part in others]
        return lines

    def _line(self, row: list[tuple[str, str]], widths: list[int]) -> Text:
        line = Text()
        for i, ((text, style), width) in enumerate(zip(row, widths, strict=True)):
            cell, blank = Text(text, style=style), Text(" " * (width - cell_len(text)))
            line += (blank + cell if i in self.right else cell + blank) + Text("  ")
        line.rstrip()
        return line
