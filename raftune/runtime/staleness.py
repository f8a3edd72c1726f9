"""Finds stages on disk that no longer match the configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from raftune.config.load import differences
from raftune.errors import ConfigChanged, ConfigError, RunDamaged, StoreError
from raftune.protocols import Stage, SupportsConfigCheck
from raftune.runtime import rescoring
from raftune.runtime.assembly import Runtime
from raftune.runtime.rescoring import Rescoring, RoundStage
from raftune.store.commit import stage_key
from raftune.store.job import fields_of, hashes_of
from raftune.store.layout import source_of

READS = "what it reads"


@dataclass(frozen=True)
class StaleStage:
    """A committed stage that does not match the configuration, and the fields that differ: old, new."""

    round: int
    stage: Stage
    fields: dict[str, tuple[Any, Any]]

    @property
    def words(self) -> str:
        changes = ", ".join(change(name, old, new) for name, (old, new) in sorted(self.fields.items()))
        return changes or "the stages it was made from have changed"


def change(name: str, old: Any, new: Any) -> str:
    """A difference in words; of a hash, what it stands for."""
    if name == READS:
        parts = (("no longer reads", old), ("now also reads", new))
        return " and ".join(f"it {word} {', '.join(which)}" for word, which in parts if which)
    if name.startswith("hash of "):
        return f"the {name.removeprefix('hash of ')} have changed (their code, options or weights)"
    return f"{name}: {short(old)} → {short(new)}"


def check(assembly: Runtime, redo: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """Makes sure that what is on disk is whole and belongs to the configuration; returns what was set aside.

    `redo` is STAGE or ROUND/STAGE, or several with commas: that stage, in this round and in later ones, all that is
    made from it, and all that is stale after it move to superseded/. With `only` these stages are score stages, and
    keep the scores of all samples but those of these statuses; what was begun so is ended by whoever comes next, unless
    `redo` names what it was made from. Raises RunDamaged, ConfigChanged (with the
    differences), StoreError where weights or latents are gone that would be needed, ConfigError for a stage that does
    not exist, and for an option that the initial model does not have.
    """
    first = [parse(name, assembly) for name in redo.split(",")] if redo is not None else []
    begun = rescoring.begun(assembly.run)
    over: set[RoundStage] = set()
    if only:
        again = begun or rescoring.wanted(table(assembly), first, Rescoring(str(redo), tuple(only)), assembly)
        again.refuse_another(str(redo), only)
        first = []
    else:
        again = begun or Rescoring("", ())
        over = {*again.places} & follows(assembly, first).keys()
    exact = again.not_set_aside(assembly.run) - over
    chosen = follows(assembly, first, exact)
    refuse_damage(assembly, chosen)
    if chosen:
        refuse_dropped(assembly, chosen, redo or again.redo)
        check_config(assembly, chosen)
    elif assembly.run.is_committed(0, "model"):
        assembly.family.verify(assembly.run.folder(0, "model"))
    if stale := first_stale(assembly, chosen):
        name = f"{stale.round}/{label(stale.stage)}"
        raise ConfigChanged(
            f"{stale.stage.name} of round {stale.round} was made with other settings: {stale.words}. "
            f"Put them back, choose another output_dir, or add `--from {name}` to redo it and what follows."
        )
    if only and begun is None:
        kept = [(r, s.writes) for (r, _), s in chosen.items() if (r, s.writes) in exact and not reads_any(s, r, chosen)]
        rescoring.begin(assembly.run, again, kept)
    aside = set_aside(assembly, chosen)
    rescoring.let_go(assembly.run, over)
    return aside


def reads_any(stage: Stage, round_: int, chosen: Collection[RoundStage]) -> bool:
    """Whether the stage is made from one of these."""
    return any(source_of(read, round_) in chosen for read in stage.reads)


def table(assembly: Runtime) -> Iterator[tuple[int, Stage]]:
    """The stages of all rounds that have a directory, in the order in which the loop makes them."""
    rounds = assembly.run.rounds()
    for round_ in range((rounds[-1] if rounds else -1) + 1):
        for stage in assembly.stages(round_):
            yield round_, stage


def follows(
    assembly: Runtime, first: Sequence[tuple[int, str]], exact: Collection[RoundStage] = ()
) -> dict[RoundStage, Stage]:
    """The stages of these names from these rounds on, and the `exact` ones; what is made from them, and what is stale
    after them."""
    chosen: dict[RoundStage, Stage] = {}
    for r, stage in table(assembly):
        named = any(r >= round_ and stage.name == name for round_, name in first) or (r, stage.writes) in exact
        if named or reads_any(stage, r, chosen) or (chosen and stale_of(assembly, r, stage)):
            chosen[r, stage.writes] = stage
    return chosen


def refuse_damage(assembly: Runtime, chosen: dict[RoundStage, Stage]) -> None:
    """Raises RunDamaged for the first thing that is wrong with what stays."""
    faults = assembly.run.faults(without=chosen.keys())
    if faults:
        more = f" (and {len(faults) - 1} more: `raftune verify` lists them)" if len(faults) > 1 else ""
        raise RunDamaged(
            f"{faults[0]}{more}. Restore it, or redo its stage and what follows with "
            f"`--from {first_damaged(assembly, chosen)}`."
        )


def first_damaged(assembly: Runtime, chosen: dict[RoundStage, Stage]) -> str:
    """The earliest stage that is not as it was committed, as --from takes it."""
    stays = ((round_, stage) for round_, stage in table(assembly) if (round_, stage.writes) not in chosen)
    damaged = (f"{r}/{label(stage)}" for r, stage in stays if assembly.run.faults_of(r, stage.writes))
    return next(damaged, "ROUND/STAGE")


def refuse_dropped(assembly: Runtime, chosen: dict[RoundStage, Stage], redo: str) -> None:
    """Raises StoreError where something must be redone from weights, or from latents, that were dropped."""
    for (round_, _), stage in chosen.items():
        for source in (source_of(read, round_) for read in stage.reads):
            if source not in chosen and assembly.run.is_dropped(*source):
                raise StoreError(
                    f"{stage.name} of round {round_} cannot be redone: the weights of round {source[0]} were dropped "
                    f"(keep_models: {assembly.config.keep_models}). Redo from {source[0]}/train, or from a later round."
                )
        for source in (source_of(read, round_) for read in getattr(stage, "whole", ())):
            if source not in chosen and (gone := assembly.run.dropped_columns(*source)):
                raise StoreError(
                    f"{stage.name} of round {round_} cannot be redone: of what was generated in it the "
                    f"{', '.join(gone)} "
                    "were dropped (keep_latents), but for those of the samples that were kept then. Generate it again, "
                    f"which gives the same: --from {redo},{round_}/{source[1]}"
                )


def check_config(assembly: Runtime, chosen: dict[RoundStage, Stage]) -> None:
    """Raises ConfigError for options that the initial model does not have, before anything is set aside for them."""
    asks_a_model = any(read.startswith("model") for stage in chosen.values() for read in stage.reads)
    if not asks_a_model or (0, "model") in chosen or not assembly.run.is_committed(0, "model"):
        return  # the start itself is checked when it is made
    start = assembly.policies.encoder(assembly.run.folder(0, "model"))
    if isinstance(start, SupportsConfigCheck):
        start.check_config()


def first_stale(assembly: Runtime, chosen: dict[RoundStage, Stage]) -> StaleStage | None:
    """The first stage that stays although the configuration would make it otherwise."""
    stays = ((round_, stage) for round_, stage in table(assembly) if (round_, stage.writes) not in chosen)
    return next((stale for round_, stage in stays if (stale := stale_of(assembly, round_, stage))), None)


def stale_of(assembly: Runtime, round_: int, stage: Stage) -> StaleStage | None:
    """What differs, where the stage is committed under another key than the configuration would give it now."""
    commit = assembly.run.commit(round_, stage.writes)
    if commit is None:
        return None
    fields, hashes = fields_of(stage, assembly.plain), hashes_of(assembly.run, stage, round_)
    if getattr(stage, "grows", False) and fields.keys() - commit.fields.keys():
        # A version that looked at less made it: what it looked at must be as it was, and old rounds stay as they are.
        fields = {name: value for name, value in fields.items() if name in commit.fields}
        hashes = {name: value for name, value in hashes.items() if name in commit.inputs}
    if stage_key(stage.name, fields, hashes) == commit.key:
        return None
    changed = differences(commit.fields, fields)
    if commit.inputs.keys() != hashes.keys():
        changed[READS] = (sorted(commit.inputs.keys() - hashes.keys()), sorted(hashes.keys() - commit.inputs.keys()))
    return StaleStage(round_, stage, changed)


def set_aside(assembly: Runtime, chosen: dict[RoundStage, Stage]) -> list[str]:
    """Moves the stages to superseded/, the latest first, so that a kill leaves no gap; names those that there were.

    What no configured stage writes any more goes with them: it may have been made from what is redone.
    """
    if not chosen:
        return []
    run, known = assembly.run, {(round_, stage.writes) for round_, stage in table(assembly)}
    first = min(round_ for round_, _ in chosen)
    orphans = [place for place in run.places() if place not in known and place[0] >= first]
    names = [f"{stage.name} of round {r}" for (r, folder), stage in chosen.items() if run.is_committed(r, folder)]
    for place in [*orphans, *reversed(chosen)]:
        run.supersede(*place)
    return names


def parse(redo: str, assembly: Runtime) -> tuple[int, str]:
    """ROUND/STAGE, or STAGE of the first round that has it. Raises ConfigError."""
    number, _, wanted = redo.rpartition("/")
    if number and not number.isdigit():
        raise ConfigError(f"--from must be STAGE or ROUND/STAGE; got {redo!r}. Write --from 3/select, for example.")
    for round_ in [int(number)] if number else [0, 1]:
        for stage in assembly.stages(round_):
            if label(stage) == wanted.replace(" ", "-"):
                return round_, stage.name
    for old, new in (("draw", "generate"), ("tune", "train")):  # the names of raftune 0.1
        if wanted in (old, f"evaluation-{old}"):
            raise ConfigError(
                f"--from {redo}: {old} is called {new} since raftune 0.2. Write --from {redo.replace(old, new)}."
            )
    names = dict.fromkeys(label(stage) for round_ in (0, 1) for stage in assembly.stages(round_))
    raise ConfigError(f"--from must name a stage; got {redo!r}. The stages are {', '.join(names)}.")


def label(stage: Stage) -> str:
    """The stage's name as it is typed."""
    return stage.name.replace(" ", "-")


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
