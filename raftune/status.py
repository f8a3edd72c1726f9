"""How a run stands: finished, resumable, in use or damaged; read from its directory without changing it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raftune.digest import Row, alarms_of, best_round, done_words, rows_of
from raftune.errors import RaftuneError
from raftune.plain import first_line
from raftune.store.run import RunFolder

FINISHED, RESUMABLE, IN_USE, DAMAGED = "finished", "resumable", "in use", "damaged"


@dataclass(frozen=True)
class Status:
    """One run. `best` and the two rewards are None where nothing was measured yet; `why` explains the state.

    `alarms` counts those of all rounds.
    """

    root: Path
    name: str
    family: str
    rounds: int
    num_rounds: int
    best: int | None
    start_reward: float | None
    best_reward: float | None
    state: str
    when: datetime
    why: str = ""
    alarms: int = 0

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "root": str(self.root), "when": self.when.isoformat(timespec="seconds")}


def status_of(root: Path) -> Status:
    """The run's status; what cannot be read makes it damaged. File contents are not hashed: `verify` does that."""
    changed = max((path.stat().st_mtime for path in root.iterdir() if path.is_file()), default=0)
    when = datetime.fromtimestamp(changed).astimezone()
    try:
        config = RunFolder(root).read_config()
        name, family, planned = config["name"], config["policy"]["family"], int(config["num_rounds"])
    except (RaftuneError, OSError, KeyError, TypeError) as error:
        return Status(root, root.name, "?", 0, 0, None, None, None, DAMAGED, when, first_line(error))
    try:
        return progress_of(Status(root, name, family, 0, planned, None, None, None, RESUMABLE, when), config)
    except (RaftuneError, OSError, ValueError, KeyError, TypeError) as error:
        return Status(root, name, family, 0, planned, None, None, None, DAMAGED, when, first_line(error))


def progress_of(status: Status, config: dict[str, Any]) -> Status:
    """The status with what the run's COMMITs say. Raises what reading them raises."""
    run = RunFolder(status.root)
    for round_, name in run.places():  # each COMMIT can be read, and is of a version that we know
        run.commit(round_, name)
    rows = rows_of(status.root)
    best = best_round(status.root)
    rewards = {row["round"]: row.get("reward") for row in rows}
    state, why = state_of(run, config, rows)
    return replace(
        status,
        rounds=max(rewards, default=0),
        best=best,
        start_reward=rewards.get(0),
        best_reward=rewards.get(best) if best is not None else None,
        state=state,
        why=why,
        alarms=sum(len(alarms_of(run, round_)) for round_ in run.rounds()),
    )


def state_of(run: RunFolder, config: dict[str, Any], rows: list[Row]) -> tuple[str, str]:
    """The state in a word, and why in a few."""
    if in_use(run.root):
        return IN_USE, "a process holds its lock"
    nothing: dict[str, Any] = {}
    last = functools.reduce(lambda _, event: event, run.events, nothing)
    done = rows[-1]["round"] if rows else 0
    if rows and done >= config["num_rounds"]:
        return FINISHED, done_words(config["num_rounds"])
    if last.get("event") == "end":
        return FINISHED, str(last.get("reason", ""))
    return RESUMABLE, f"round {done + 1 if rows else 0} is not finished"


def in_use(root: Path) -> bool:
    """Whether a process holds the run's lock."""
    lock = root / "LOCK"
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a directory that may only be read: nobody can work in it
        return False
