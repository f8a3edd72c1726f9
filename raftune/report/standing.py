"""State of a run for its report: status, rounds, best round and reward names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raftune.config.load import validate
from raftune.config.run import RunConfig, held_out_names
from raftune.errors import RaftuneError
from raftune.records import Row
from raftune.report.numbers import by_round
from raftune.report.reading import RunReader
from raftune.results.status import in_use
from raftune.sanitize import counted, first_line


@dataclass(frozen=True)
class RunState:
    """`config` is None where it is lost, or another version's; `best_by` says what the best round was chosen by."""

    name: str
    state: str
    words: str
    rounds: tuple[int, ...]
    best: int
    best_by: str
    rewards: tuple[str, ...]
    judges: tuple[str, ...]
    config: RunConfig | None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.state,
            "status_words": self.words,
            "rounds": list(self.rounds),
            "best": self.best,
            "best_by": self.best_by,
        }


def standing_of(reader: RunReader, rows: list[Row], *, working: bool | None = None) -> RunState:
    """The standing; a process that holds the run says of itself whether it is still `working`, others ask the lock."""
    config = config_of(reader)
    rounds = tuple(int(row["round"]) for row in rows)
    best, best_by = best_of(reader, config, rounds)
    state, words = state_of(reader, rounds, working)
    return RunState(
        name=str(reader.config.get("name", reader.run.root.resolve().name)),
        state=state,
        words=words,
        rounds=rounds,
        best=best,
        best_by=best_by,
        rewards=(config.rewards.names if config is not None else ()) or reward_names(reader, ""),
        judges=(held_out_names(config) if config is not None else ()) or reward_names(reader, "held_out/"),
        config=config,
    )


def config_of(reader: RunReader) -> RunConfig | None:
    """The run's configuration; None, and a note, where it is lost or not one of this version's."""
    if not reader.config:
        return None
    try:
        return validate(reader.config)
    except RaftuneError as error:
        reader.note("the run", f"config.resolved.json is not of this version: {first_line(error)}")
        return None


def state_of(reader: RunReader, rounds: tuple[int, ...], working: bool | None) -> tuple[str, str]:
    """A word for programs, and a sentence that stays true when the page is opened later."""
    done, planned = max(rounds, default=0), reader.config.get("num_rounds")
    so_far = f"{done} of {planned} rounds done" if planned else f"{counted(done, 'round')} done"
    if not reader.config:
        return "damaged", f"damaged: {so_far}; what can be read is shown"
    if working or (working is None and in_use(reader.run.root)):
        return "running", f"at work when this was written: {so_far}"
    if reader.ended():
        return "finished", f"finished: {reader.events[-1].get('reason') or so_far}"
    if isinstance(planned, int) and rounds and done >= planned:
        return "finished", f"finished: {so_far}"
    return "interrupted", f"interrupted: {so_far}; raftune resume goes on with it"


def best_of(reader: RunReader, config: RunConfig | None, rounds: tuple[int, ...]) -> tuple[int, str]:
    """The published round; before there is one, the one that would be: the highest value, the earliest of equals."""
    published = reader.own_json("best.json")
    if isinstance(published.get("round"), int) and published["round"] in rounds:
        return int(published["round"]), str(published.get("by", ""))
    by = config.evaluation.best_by if config is not None else "reward"
    for name in (by, f"held_out/rewards/{by}/mean", f"rewards/{by}/mean"):
        if values := by_round(reader, name):
            return max(values, key=lambda round_: (values[round_].mean, -round_)), by
    return max(rounds, default=0), "last round"


def reward_names(reader: RunReader, prefix: str) -> tuple[str, ...]:
    """The names of rewards as the metrics have them: those given as objects stand in no configuration."""
    found: dict[str, None] = {}
    for round_ in reader.rounds("evaluate"):
        metrics: Mapping[str, Any] = reader.json(round_, "evaluate", "metrics.json")
        start = f"{prefix}rewards/"
        found |= dict.fromkeys(n[len(start) : -5] for n in metrics if n.startswith(start) and n.endswith("/mean"))
    return tuple(found)
