"""`raftune runs`: lists the runs in a folder."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.output import PlainTable, echo
from raftune.results.status import DAMAGED, FINISHED, IN_USE, RunStatus, status_of
from raftune.runtime.run import all_runs

STYLES = {FINISHED: "green", IN_USE: "cyan", DAMAGED: "bold red"}


def runs(
    folder: Annotated[str, Parameter(help="The folder.")] = "runs",
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print a JSON list.")] = False,
) -> None:
    """List the runs in a folder: progress, best round, and whether they can be resumed."""
    found = sorted((status_of(path) for path in all_runs(folder)), key=lambda status: status.when)
    if json:
        print(js.dumps([status.as_json() for status in found]))
    elif not found:
        echo(f"There is no run in {Path(folder)}. `raftune train run.yaml` makes one.")
    else:
        show(found)


def show(found: list[RunStatus]) -> None:
    grid = PlainTable("run", "family", "rounds", "best", "reward", "alarms", "state", "when")
    for status in found:
        grid.add(
            status.root.name,
            status.family,
            f"{status.rounds}/{status.num_rounds}" if status.num_rounds else "evaluation",
            "–" if status.best is None else str(status.best or "start"),
            rewards(status),
            str(status.alarms or "–"),
            (status.state, STYLES.get(status.state, "yellow")),
            f"{status.when:%Y-%m-%d %H:%M}",
        )
    grid.show()
    for status in found:
        if status.state == DAMAGED:
            echo(f"{status.root.name}: {status.why}")
        elif status.generation and (len(found) == 1 or not status.generation.startswith("shared prefix")):
            echo(f"{status.root.name} generates by {status.generation}")


def rewards(status: RunStatus) -> str:
    """From the start's reward to the best round's."""
    if status.start_reward is None:
        return "–"
    return f"{status.start_reward:.3f}" + ("" if status.best_reward is None else f" → {status.best_reward:.3f}")
