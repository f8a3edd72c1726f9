"""`raftune runs`: lists the runs in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.flags import Json
from raftune.cli.output import PlainTable, echo
from raftune.results.status import DAMAGED, FINISHED, IN_USE, status_of
from raftune.runtime.run import all_runs

STYLES = {FINISHED: "green", IN_USE: "cyan", DAMAGED: "bold red"}


def runs(folder: Annotated[str, Parameter(help="The folder.")] = "runs", *, as_json: Json = False) -> None:
    """List the runs in a folder: progress, best round, and whether they can be resumed."""
    statuses = sorted((status_of(path) for path in all_runs(folder)), key=lambda status: status.when)
    if as_json:
        print(json.dumps([status.as_json() for status in statuses]))
        return
    if not statuses:
        echo(f"There is no run in {Path(folder)}. `raftune train run.yaml` makes one.")
        return
    table = PlainTable("run", "family", "rounds", "best", "reward", "alarms", "state", "when")
    for status in statuses:
        start, best = status.start_reward, status.best_reward
        rewards = "–" if start is None else f"{start:.3f}" if best is None else f"{start:.3f} → {best:.3f}"
        table.add(
            status.root.name,
            status.family,
            f"{status.rounds}/{status.num_rounds}" if status.num_rounds else "evaluation",
            "–" if status.best is None else str(status.best or "start"),
            rewards,
            str(status.alarms or "–"),
            (status.state, STYLES.get(status.state, "yellow")),
            f"{status.when:%Y-%m-%d %H:%M}",
        )
    table.show()
    for status in statuses:
        if status.state == DAMAGED:
            echo(f"{status.root.name}: {status.why}")
        elif status.generation and (len(statuses) == 1 or not status.generation.startswith("shared prefix")):
            echo(f"{status.root.name} generates by {status.generation}")
