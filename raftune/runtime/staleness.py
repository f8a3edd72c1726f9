"""Finds stages on disk that no longer match the configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from raftune.config.load import differences
from raftune.errors import ConfigChanged, ConfigError, RunDamaged, StoreError
from raftune.protocols import Stage, SupportsConfigCheck
from raftune.runtime import rescoring
from raftune.runtime.assembly import Runtime
from raftune.runtime.rescoring import Rescoring, RoundStage
from raftune.store.commit import stage_key
from raftune.store.files import discard
from raftune.store.job import fields_of, hashes_of
from raftune.store.layout import source_of

_READS = "what it reads"


def change(name: str, old: Any, new: Any) -> str:
    """A difference in words; of a hash, what it is the hash of."""
    if name == _READS:
        parts = (("no longer reads", old), ("now also reads", new))
        return " and ".join(f"it {verb} {', '.join(names)}" for verb, names in parts if names)
    if name.startswith("hash of "):
        return f"the {name.removeprefix('hash of ')} have changed (their code, options or weights)"
    before, after = (text if len(text) <= 40 else text[:37] + "…" for text in (str(old), str(new)))
    return f"{name}: {before} → {after}"


def check(runtime: Runtime, redo: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """Checks that the files of the run are whole and match the configuration; returns the stages it set aside.

    `redo` is STAGE or ROUND/STAGE, or several with commas: that stage, in this round and later ones, all that is made
    from it, and all that is stale after it move to superseded/. With `only` these are score stages, which keep the
    scores of all samples but those of these statuses; such work is continued by the next call, unless `redo` names
    what it was made from. Raises RunDamaged, ConfigChanged (with the differences), StoreError where deleted weights or
    latents would be needed, ConfigError for an unknown stage and for an option that the initial model lacks.
    """
    run = runtime.run
    first = named_stages(runtime, redo)
    unfinished = rescoring.unfinished(run)
    over: set[RoundStage] = set()
    if only:
        again = unfinished or rescoring.wanted(runtime, _table(runtime), first, str(redo), only)
        if (again.redo, again.only) != (str(redo), tuple(only)):
            raise ConfigError(
                f"--only must be {','.join(again.only)}, with --from {again.redo}, until the started rescoring is "
                f"complete; got {','.join(only)}, with --from {redo}. Resume the run without both first."
            )
        first = []
    else:
        again = unfinished or Rescoring("", ())
        over = {*again.places} & _follows(runtime, first).keys()
    exact = again.not_set_aside(run) - over
    chosen = _follows(runtime, first, exact)
    _check_damage(runtime, chosen)
    if chosen:
        _check_dropped(runtime, chosen, redo or again.redo)
        from_model = any(read.startswith("model") for stage in chosen.values() for read in stage.reads)
        if from_model and (0, "model") not in chosen and run.is_committed(0, "model"):
            start = runtime.policies.encoder(run.folder(0, "model"))
            if isinstance(start, SupportsConfigCheck):
                start.check_config()  # before anything is set aside
    elif run.is_committed(0, "model"):
        runtime.family.verify(run.folder(0, "model"))
    for round_, stage in _table(runtime):
        if (round_, stage.writes) not in chosen and (changed := _changed(runtime, round_, stage)) is not None:
            words = ", ".join(change(name, old, new) for name, (old, new) in sorted(changed.items()))
            raise ConfigChanged(
                f"{stage.name} of round {round_} was made with other settings: "
                f"{words or 'the stages it was made from have changed'}. Put them back, choose another output_dir, or "
                f"add `--from {round_}/{_label(stage)}` to redo it and what follows."
            )
    if only and unfinished is None:
        kept = [key for key in chosen if key in exact and not _reads_any(chosen[key], key[0], chosen)]
        rescoring.begin(run, again, kept)
    aside = _set_aside(runtime, chosen)
    for key in sorted(over):  # their samples are generated again
        discard(run.earlier_scores(*key), run.tmp)
    return aside


def _table(runtime: Runtime) -> Iterator[tuple[int, Stage]]:
    """The stages of all rounds that have a directory, in the order in which the loop runs them."""
    for round_ in range(max(runtime.run.rounds(), default=-1) + 1):
        for stage in runtime.stages(round_):
            yield round_, stage


def _reads_any(stage: Stage, round_: int, chosen: Collection[RoundStage]) -> bool:
    return any(source_of(read, round_) in chosen for read in stage.reads)


def _follows(
    runtime: Runtime, first: Sequence[tuple[int, str]], exact: Collection[RoundStage] = ()
) -> dict[RoundStage, Stage]:
    """The stages of these names from these rounds on, and the `exact` ones; what is made from them, and what is stale
    after them."""
    chosen: dict[RoundStage, Stage] = {}
    for r, stage in _table(runtime):
        named = any(r >= round_ and stage.name == name for round_, name in first) or (r, stage.writes) in exact
        if named or _reads_any(stage, r, chosen) or (chosen and _changed(runtime, r, stage) is not None):
            chosen[r, stage.writes] = stage
    return chosen


def _changed(runtime: Runtime, round_: int, stage: Stage) -> dict[str, tuple[Any, Any]] | None:
    """The fields, old and new, of a stage that is committed under another key than the configuration gives it; else
    None."""
    commit = runtime.run.commit(round_, stage.writes)
    if commit is None:
        return None
    fields, hashes = fields_of(stage, runtime.plain), hashes_of(runtime.run, stage, round_)
    if stage.grows and fields.keys() - commit.fields.keys():
        # An earlier version had fewer fields and inputs: those must be as they were.
        fields = {name: value for name, value in fields.items() if name in commit.fields}
        hashes = {name: value for name, value in hashes.items() if name in commit.inputs}
    if stage_key(stage.name, fields, hashes) == commit.key:
        return None
    changed = differences(commit.fields, fields)
    if commit.inputs.keys() != hashes.keys():
        changed[_READS] = (sorted(commit.inputs.keys() - hashes.keys()), sorted(hashes.keys() - commit.inputs.keys()))
    return changed


def _check_damage(runtime: Runtime, chosen: dict[RoundStage, Stage]) -> None:
    """Raises RunDamaged for the first fault of what stays, naming the earliest damaged stage."""
    if not (faults := runtime.run.faults(without=chosen.keys())):
        return
    more = f" (and {len(faults) - 1} more: `raftune verify` lists them)" if len(faults) > 1 else ""
    stays = ((round_, stage) for round_, stage in _table(runtime) if (round_, stage.writes) not in chosen)
    damaged = (f"{r}/{_label(stage)}" for r, stage in stays if runtime.run.faults_of(r, stage.writes))
    raise RunDamaged(
        f"{faults[0]}{more}. Restore it, or redo its stage and what follows with "
        f"`--from {next(damaged, 'ROUND/STAGE')}`."
    )


def _check_dropped(runtime: Runtime, chosen: dict[RoundStage, Stage], redo: str) -> None:
    """Raises StoreError where something must be redone from weights, or from latents, that were deleted."""
    for (round_, _), stage in chosen.items():
        for source in (source_of(read, round_) for read in stage.reads):
            if source not in chosen and runtime.run.is_dropped(*source):
                raise StoreError(
                    f"{stage.name} of round {round_} cannot be redone: the weights of round {source[0]} were dropped "
                    f"(keep_models: {runtime.config.keep_models}). Redo from {source[0]}/train, or from a later round."
                )
        for source in (source_of(read, round_) for read in stage.whole):
            if source not in chosen and (gone := runtime.run.dropped_columns(*source)):
                raise StoreError(
                    f"{stage.name} of round {round_} cannot be redone: of what was generated in it the "
                    f"{', '.join(gone)} were dropped (keep_latents), but for those of the samples that were kept then. "
                    f"Generate it again, which gives the same: --from {redo},{round_}/{source[1]}"
                )


def _set_aside(runtime: Runtime, chosen: dict[RoundStage, Stage]) -> list[str]:
    """Moves the stages to superseded/, the latest first, so that a kill leaves no gap; names those that there were.

    Folders that no configured stage writes any more go first: they may have been made from what is redone.
    """
    if not chosen:
        return []
    run, configured = runtime.run, {(round_, stage.writes) for round_, stage in _table(runtime)}
    first = min(round_ for round_, _ in chosen)
    orphans = [key for key in run.places() if key not in configured and key[0] >= first]
    names = [f"{stage.name} of round {r}" for (r, folder), stage in chosen.items() if run.is_committed(r, folder)]
    for key in [*orphans, *reversed(chosen)]:
        run.supersede(*key)
    return names


def named_stages(runtime: Runtime, redo: str | None) -> list[tuple[int, str]]:
    """The stages that `--from` names, each with the round that it starts at. Raises ConfigError."""
    return [_parse(name, runtime) for name in redo.split(",")] if redo is not None else []


def _parse(redo: str, runtime: Runtime) -> tuple[int, str]:
    """ROUND/STAGE, or STAGE of the first round that has it. Raises ConfigError."""
    number, _, name = redo.rpartition("/")
    if number and not number.isdigit():
        raise ConfigError(f"--from must be STAGE or ROUND/STAGE; got {redo!r}. Write --from 3/select, for example.")
    for round_ in [int(number)] if number else [0, 1]:
        for stage in runtime.stages(round_):
            if _label(stage) == name.replace(" ", "-"):
                return round_, stage.name
    for old, new in (("draw", "generate"), ("tune", "train")):  # the names of raftune 0.1
        if name in (old, f"evaluation-{old}"):
            raise ConfigError(
                f"--from {redo}: {old} is called {new} since raftune 0.2. Write --from {redo.replace(old, new)}."
            )
    names = dict.fromkeys(_label(stage) for round_ in (0, 1) for stage in runtime.stages(round_))
    raise ConfigError(f"--from must name a stage; got {redo!r}. The stages are {', '.join(names)}.")


def _label(stage: Stage) -> str:
    """The stage's name on the command line."""
    return stage.name.replace(" ", "-")
