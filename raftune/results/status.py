"""Status of a run: finished, resumable, in use or damaged. Reads only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raftune.errors import RaftuneError
from raftune.results.summary import alarms_of, best_round, done_words, is_done, read_row
from raftune.sanitize import first_line
from raftune.stages.parity import generation_words
from raftune.store.committed import is_listed, read_json
from raftune.store.run import RunFolder

FINISHED, RESUMABLE, IN_USE, DAMAGED, NOT_STARTED = "finished", "resumable", "in use", "damaged", "not started"
NEWEST = 20  # rounds all of whose manifests are read


@dataclass(frozen=True)
class RunStatus:
    """One run. `best` and the two rewards are None where nothing was measured yet; `why` explains the state.

    `alarms` counts those of all rounds; `generation` says how samples are generated, empty where there is one way only.
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
    generation: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "root": str(self.root), "when": self.when.isoformat(timespec="seconds")}


def status_of(root: Path) -> RunStatus:
    """The run's status; what cannot be read makes it damaged. All of it is read by `verify` alone: here, of a long run,
    the start, the best round and the newest ones."""
    status = RunStatus(root, root.name, "?", 0, 0, None, None, None, DAMAGED, datetime.fromtimestamp(0).astimezone())
    run = RunFolder(root)
    try:
        changed = max((path.stat().st_mtime for path in root.iterdir() if path.is_file()), default=0)
        status = replace(status, when=datetime.fromtimestamp(changed).astimezone())
        config = run.read_config()
        names = {"name": config["name"], "family": config["policy"]["family"]}
        status = replace(status, **names, num_rounds=int(config["num_rounds"]))
        rounds, best = run.rounds(), best_round(root)
        looked = {*rounds[:1], *rounds[-NEWEST:], *(r for r in rounds if r == best)}
        for round_, name in run.places(sorted(looked)):
            run.commit(round_, name)  # it can be read, and is of a version that we know
        last = next((round_ for round_ in reversed(rounds) if is_done(run, round_)), None)
        rewards = {r: read_row(run, r).get("reward") for r in sorted(looked) if is_done(run, r)}
        state, why = state_of(run, status.num_rounds, last)
        return replace(
            status,
            rounds=last or 0,
            best=best,
            start_reward=rewards.get(0),
            best_reward=rewards.get(best) if best is not None else None,
            state=state,
            why=why,
            alarms=sum(len(alarms_of(run, round_)) for round_ in rounds if may_alarm(run, round_)),
            generation=generation_of(run, rounds),
        )
    except (RaftuneError, OSError, ValueError, KeyError, TypeError) as error:
        return replace(status, why=first_line(error))


def generation_of(run: RunFolder, rounds: Sequence[int]) -> str:
    """How the run generates, in words; empty where nothing was recorded."""
    record = run.folder(0, "parity") / "backend.json"
    if not record.is_file():
        return ""
    adapted = [r for r in rounds if (run.folder(r, "model") / "adapter_config.json").is_file()]
    probe = run.folder(adapted[-1], "model") / "parity.json" if adapted else record
    reports = [run.folder(r, "model") / "training.json" for r in rounds if r]
    trained = [path for path in reports if path.is_file()]
    mismatch = read_json(trained[-1])["details"].get("mismatch") if trained else None
    adapter = read_json(probe) if probe != record and probe.is_file() else None
    return generation_words(read_json(record), adapter, mismatch)


def may_alarm(run: RunFolder, round_: int) -> bool:
    """Whether a round's list of alarms is not known to be empty: to look at one costs less than to check it."""
    path = run.folder(round_, "guard") / "alarms.json"
    try:
        return path.read_bytes() != b"[]\n"
    except OSError:
        return is_listed(path)


def state_of(run: RunFolder, planned: int, last: int | None) -> tuple[str, str]:
    """The state in a word, and why in a few; `last` is the last round that is done."""
    if in_use(run.root):
        return IN_USE, "a process holds its lock"
    if last is not None and last >= planned:
        return FINISHED, done_words(planned)
    event = run.events.last()
    if event.get("event") == "end":
        return FINISHED, str(event.get("reason", ""))
    if not any(run.is_committed(*place) for place in run.places()):
        return NOT_STARTED, "it was refused, or stopped, before anything was made"
    if not planned:
        return RESUMABLE, "the evaluation is not finished"
    return RESUMABLE, f"round {last + 1 if last is not None else 0} is not finished"


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
