"""What is on disk against what the configuration says: stale stages are named, and redone only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raftune.build import Assembly
from raftune.config.load import differences
from raftune.errors import ConfigChanged, ConfigError, RunDamaged
from raftune.protocols import Stage
from raftune.store.commit import Commit


@dataclass(frozen=True)
class Stale:
    """A committed stage that the configuration would make otherwise, and the fields that differ: old, new."""

    round: int
    stage: Stage
    fields: dict[str, tuple[Any, Any]]

    @property
    def words(self) -> str:
        changes = ", ".join(f"{name}: {short(old)} → {short(new)}" for name, (old, new) in sorted(self.fields.items()))
        return changes or "the stages it was made from have changed"


def check(assembly: Assembly, redo: str | None = None) -> list[str]:
    """Makes sure that what is on disk is whole and belongs to the configuration; returns what was set aside.

    `redo` is STAGE or ROUND/STAGE: that stage and everything after it move to superseded/. Raises RunDamaged,
    ConfigChanged (with the differences), ConfigError for a stage that does not exist.
    """
    if redo is not None:
        return set_aside(assembly, redo)
    refuse_damage(assembly)
    if assembly.run.commit(0, "model") is not None:
        assembly.family.verify(assembly.run.folder(0, "model"))
    if stale := first_stale(assembly):
        raise ConfigChanged(
            f"{stale.stage.name} of round {stale.round} was made with other settings: {stale.words}. "
            f"Put them back, choose another output_dir, or add `--from {stale.stage.name.replace(' ', '-')}` to redo it and what follows."
        )
    return []


def refuse_damage(assembly: Assembly) -> None:
    faults = assembly.run.faults()
    if faults:
        more = f" (and {len(faults) - 1} more: `raftune verify` lists them)" if len(faults) > 1 else ""
        raise RunDamaged(
            f"{faults[0]}{more}. Restore it, or redo its stage and what follows with `--from ROUND/STAGE`."
        )


def committed(assembly: Assembly) -> Iterator[tuple[int, Stage, Commit]]:
    """The committed stages in the order in which the loop makes them."""
    rounds = assembly.run.rounds()
    for round_ in range((rounds[-1] if rounds else -1) + 1):
        for stage in assembly.stages(round_):
            if commit := assembly.run.commit(round_, stage.writes):
                yield round_, stage, commit


def first_stale(assembly: Assembly) -> Stale | None:
    """The first committed stage whose key is not what the configuration would give it now."""
    for round_, stage, commit in committed(assembly):
        job = assembly.job(stage, round_)
        if job.key != commit.key:
            changed = differences(commit.fields, job.fields)
            return Stale(round_, stage, changed)
    return None


def set_aside(assembly: Assembly, redo: str) -> list[str]:
    """Moves the stage and everything after it to superseded/, the latest first, so that a kill leaves no gap."""
    round_, name = parse(redo, assembly)
    order = [(r, stage) for r, stage, _ in committed(assembly)]
    known = [stage.name for stage in assembly.stages(round_)]
    rank = known.index(name)
    chosen = [(r, s) for r, s in order if r > round_ or (r == round_ and known.index(s.name) >= rank)]
    for r, stage in reversed(chosen):
        assembly.run.supersede(r, stage.writes)
    for r in assembly.run.rounds():
        for stage in reversed(assembly.stages(r)):
            begun = r > round_ or (r == round_ and known.index(stage.name) >= rank)
            if begun and assembly.run.commit(r, stage.writes) is None and stage.writes != "evaluate":
                assembly.run.clear(r, stage.writes)
    refuse_damage(assembly)
    if stale := first_stale(assembly):
        raise ConfigChanged(
            f"{stale.stage.name} of round {stale.round} comes before {redo} and was made with other settings: {stale.words}. "
            f"Use `--from {stale.stage.name.replace(' ', '-')}`, or put them back."
        )
    return [f"{stage.name} of round {r}" for r, stage in chosen]


def parse(redo: str, assembly: Assembly) -> tuple[int, str]:
    """ROUND/STAGE, or STAGE of the first round that has it. Raises ConfigError."""
    number, _, name = redo.rpartition("/")
    name = name.replace("-", " ")
    if number and not number.isdigit():
        raise ConfigError(f"--from must be STAGE or ROUND/STAGE; got {redo!r}. Write --from 3/select, for example.")
    rounds = [int(number)] if number else [0, 1]
    for round_ in rounds:
        names = [stage.name for stage in assembly.stages(round_)]
        preferred = round_ == 1 or number or name not in [stage.name for stage in assembly.stages(1)]
        if name in names and preferred:
            return round_, name
    known = ", ".join(stage.name.replace(" ", "-") for stage in assembly.stages(1))
    raise ConfigError(f"--from must name a stage; got {redo!r}. The stages of a round are {known}.")


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
