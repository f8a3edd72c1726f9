"""The overview of a run."""

from __future__ import annotations

from raftune.digest import cell, columns_for
from raftune.report.collect import Collected
from raftune.report.markup import block, table, text


def overview(found: Collected) -> str:
    """The table by round."""
    return by_round(found)


def by_round(found: Collected) -> str:
    """Every number of every round, as the command line shows it at the end of a run."""
    columns = columns_for(found.rows, found.standing.judges)
    best = next((i for i, row in enumerate(found.rows) if row["round"] == found.standing.best), None)
    rows = [[text(cell(column, row)) for column in columns] for row in found.rows]
    titles = [f'<abbr title="{text(column.meaning)}">{text(column.title)}</abbr>' for column in columns]
    return block("by-round", "By round", table(titles, rows, label="Numbers of each round", best=best))
