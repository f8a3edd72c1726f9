"""Prints plain lines and tables, with control characters removed."""

from __future__ import annotations

import re
import sys
import textwrap

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from raftune.sanitize import harmless

Cell = str | tuple[str, str]
NO_BREAK = "\ue000"  # stands for a blank inside a quoted command while a line is broken
COMMAND = re.compile(r"(?:^| {2}|: )raftune ")
HEAD = re.compile(r" *(?:\S+(?: \S+)? {2,})?")  # an indent, and the word that names what the line says
NARROW = 20  # columns that a table's last column must have; with less the table is stacked


class OutputConsole(Console):
    """A console that raises if its reader has closed the pipe; rich would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """The console of results: no markup, no highlighting; long lines are left whole where nobody watches."""
    return OutputConsole(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def echo(words: str, style: str = "") -> None:
    """A line of text, made harmless; on a terminal in lines that break between words."""
    console = out()
    for line in fitted(harmless(words), room(console)):
        console.print(Text(line, style=style))


def room(console: Console) -> int | None:
    """The columns of the terminal; None where nobody watches, and lines stay whole."""
    return console.width if console.is_terminal else None


def fitted(line: str, width: int | None, begin: int = 0) -> list[str]:
    """The line broken between words to lines of at most so many columns; later ones hang below what the first says.

    A command stays whole, so that it can be pasted. `begin` columns of the first line are taken already.
    """
    if width is None or cell_len(line) + begin <= width or COMMAND.search(line):
        return [line]
    margin = HEAD.match(line)
    hang = min(len(margin[0]) if margin else 0, width // 2)
    kept_whole = re.sub(r"`[^`]*`", lambda quoted: quoted[0].replace(" ", NO_BREAK), line)
    lines = textwrap.wrap(
        kept_whole,
        width,
        initial_indent=" " * begin,
        subsequent_indent=" " * (begin + hang),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [part[begin if i == 0 else 0 :].replace(NO_BREAK, " ") for i, part in enumerate(lines)] or [""]


class PlainTable:
    """A table without borders, easy to read and to cut with awk."""

    def __init__(self, *titles: str, right: frozenset[int] = frozenset()) -> None:
        self.rows: list[list[tuple[str, str]]] = [[(title, "bold") for title in titles]]
        self.right = right

    def add(self, *cells: Cell) -> None:
        """A row; a cell is a text, or a text with a style."""
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        self.rows.append([(harmless(text), style) for text, style in pairs])

    def lines(self, width: int | None = None) -> list[Text]:
        """The rows as lines of at most so many columns: text in the last column wraps, what is wider is stacked."""
        widths = [max(Text(row[i][0]).cell_len for row in self.rows) for i in range(len(self.rows[0]))]
        if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
            return [self._line(row, widths) for row in self.rows]
        begin = sum(widths[:-1]) + 2 * (len(widths) - 1)
        if len(widths) - 1 in self.right or width - begin < NARROW:
            return self._stacked(width)
        lines = []
        for row in self.rows:
            *cells, (text, style) = row
            first, *others = fitted(text, width - begin)
            lines.append(self._line([*cells, (first, style)], [*widths[:-1], 0]))
            lines += [Text(" " * begin + part, style=style) for part in others]
        return lines

    def _stacked(self, width: int) -> list[Text]:
        """Each row as its first cell and, below it, each other cell after its title."""
        (_, *titles), *rows = self.rows
        margin = max(Text(title).cell_len for title, _ in titles) if titles else 0
        lines = []
        for (head, style), *cells in rows:
            lines.append(Text(head, style=style or "bold"))
            for (title, _), (text, own) in zip(titles, cells, strict=True):
                if text:
                    first, *others = fitted(text, max(width - margin - 4, NARROW))
                    lines.append(Text(f"  {title.strip():<{margin}}  ") + Text(first, style=own))
                    lines += [Text(" " * (margin + 4) + part, style=own) for part in others]
        return lines

    def show(self) -> None:
        console = out()
        for line in self.lines(room(console)):
            console.print(line)

    def _line(self, row: list[tuple[str, str]], widths: list[int]) -> Text:
        line = Text()
        for i, ((text, style), width) in enumerate(zip(row, widths, strict=True)):
            cell = Text(text, style=style)
            room = width - cell.cell_len
            cell = Text(" " * room) + cell if i in self.right else cell + Text(" " * room)
            line += cell + Text("  ")
        line.rstrip()
        return line
