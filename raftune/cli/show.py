"""Results on stdout: plain lines and tables, in which nothing that a model wrote can steer the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from raftune.plain import harmless

Cell = str | tuple[str, str]


class Results(Console):
    """A console whose reader may leave: rich would end the process as failed, and here it is for the caller to know."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def out() -> Console:
    """The console of results: no markup, no highlighting; long lines are left whole where nobody watches."""
    return Results(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)


def say(words: str, style: str = "") -> None:
    """A line of text, made harmless."""
    out().print(Text(harmless(words), style=style))


class Grid:
    """A table without frames, whose columns are as wide as they must be: readable, and easy to cut with awk."""

    def __init__(self, *titles: str, right: frozenset[int] = frozenset()) -> None:
        self.rows: list[list[tuple[str, str]]] = [[(title, "bold") for title in titles]]
        self.right = right

    def add(self, *cells: Cell) -> None:
        """A row; a cell is a text, or a text with a style."""
        pairs = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        self.rows.append([(harmless(text), style) for text, style in pairs])

    def lines(self) -> list[Text]:
        widths = [max(Text(row[i][0]).cell_len for row in self.rows) for i in range(len(self.rows[0]))]
        return [self._line(row, widths) for row in self.rows]

    def show(self) -> None:
        console = out()
        for line in self.lines():
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
