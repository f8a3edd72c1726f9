"""`--only`: scores samples of some statuses again and keeps all other scores.

The committed scores are copied to again/ before anything moves aside, in one rename. After that,
`resume` completes the work, and a stage that is committed again removes its copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.errors import ConfigError, RunDamaged
from raftune.protocols import Stage
from raftune.records import ScoreStatus
from raftune.runtime.assembly import Runtime
from raftune.sanitize import first_line
from raftune.stages.score import ONLY, ScoreStage, read_only, statuses_in
from raftune.store.commit import NAME, has_changed, stage_key, with_hash
from raftune.store.committed import check_file, committed
from raftune.store.files import discard, explaining, json_bytes, sha256_of, sync, unique
from raftune.store.job import fields_of, hashes_of
from raftune.store.parquet import column_names, read_table
from raftune.store.run import AGAIN, RunFolder

RECORD = "again.json"
RoundStage = tuple[int, str]  # a stage's round, and the folder that it writes in it


@dataclass(frozen=True)
class Rescoring:
    """The requested statuses, and the score stages whose scores are kept."""

    redo: str
    only: tuple[str, ...]
    places: frozenset[RoundStage] = frozenset()

    def not_set_aside(self, run: RunFolder) -> set[RoundStage]:
        """The stages that are still as they were when the work was begun."""
        if not (run.root / AGAIN).is_dir():
            return set(self.places)
        same = (place for place in self.places if run.is_committed(*place))
        return {place for place in same if sha256_of(run.earlier_scores(*place) / NAME) == run.commit_hash(*place)}

    def refuse_another(self, redo: str, only: Sequence[str]) -> None:
        """Raises ConfigError where this is not what is asked for now."""
        if (self.redo, self.only) != (redo, tuple(only)):
            raise ConfigError(
                f"--only must be {','.join(self.only)}, with --from {self.redo}, until what was begun so is done; got "
                f"{','.join(only)}, with --from {redo}. Resume the run without both first."
            )


def statuses(only: str | None, redo: str | None, run: RunFolder) -> tuple[str, ...]:
    """The statuses that `--only` names, in one order. Raises ConfigError."""
    if only is None:
        return ()
    named = {name.strip() for name in only.split(",")}
    if unknown := sorted(named - {*ScoreStatus}):
        raise ConfigError(f"--only must name statuses; got {unknown[0]!r}. They are {', '.join(ScoreStatus)}.")
    if redo is None:
        raise ConfigError(f"--only must go with --from; got {only} alone. Add --from score to redo the scores.")
    if not run.exists():
        raise ConfigError(f"--only must go with a run that has scores; {run.root} holds none. Leave --only out.")
    return tuple(sorted(named))


def wanted(
    table: Iterable[tuple[int, Stage]], first: Sequence[tuple[int, str]], asked: Rescoring, assembly: Runtime
) -> Rescoring:
    """The score stages of these names, from these rounds on, that hold samples of the statuses.

    With them those that are stale because the rewards were mended: they keep their scores, too. Raises ConfigError
    where there is no such sample, where a name is of another stage, and where the rewards bear other names now.
    """
    run, places, holds = assembly.run, set(), False
    beginning = min(round_ for round_, _ in first)
    for round_, stage in table:
        named = any(round_ >= start and stage.name == name for start, name in first)
        if named and not isinstance(stage, ScoreStage):
            raise ConfigError(
                f"--only must go with --from score, evaluation-score or evaluation-judge; got --from {asked.redo}. "
                "Leave --only out, or redo from score."
            )
        commit = run.commit(round_, stage.writes) if isinstance(stage, ScoreStage) else None
        if commit is None or not isinstance(stage, ScoreStage):
            continue
        shards = [run.folder(round_, stage.writes) / name for name in commit.files if name.endswith(".parquet")]
        has_some = named and any(has_part(path, asked.only) for path in shards)
        fields, hashes = fields_of(stage, assembly.plain), hashes_of(run, stage, round_)
        goes_along = stage.writes != "score" or round_ >= beginning
        if has_some or (goes_along and stage_key(stage.name, fields, hashes) != commit.key):
            refuse_other_rewards(shards, stage)
            places.add((round_, stage.writes))
        holds = holds or has_some
    if not holds:
        raise ConfigError(
            f"--only must name a status that a sample has; got {','.join(asked.only)}, and with --from {asked.redo} "
            "there is no such sample. Nothing was changed."
        )
    return Rescoring(asked.redo, asked.only, frozenset(places))


def has_part(path: Path, only: Collection[str]) -> bool:
    """Whether a sample in this chunk file has a part of one of these statuses."""
    columns = [name for name in column_names(path) if name.startswith("status/")]
    return any(not statuses_in(row).isdisjoint(only) for row in read_table(path, columns).to_pylist())


def refuse_other_rewards(shards: Sequence[Path], stage: ScoreStage) -> None:
    """Raises ConfigError where the scores are of other rewards than those of the configuration."""
    now = set(stage.panel().names)
    for path in shards:
        before = {name.removeprefix("status/") for name in column_names(path) if name.startswith("status/")}
        if before != now:
            raise ConfigError(
                f"--only must keep the scores of the same rewards; {path.parent} holds those of "
                f"{', '.join(sorted(before))}, and the rewards are {', '.join(sorted(now))} now. Leave --only out."
            )


def begin(run: RunFolder, asked: Rescoring, places: Sequence[RoundStage]) -> None:
    """Copies the scores of these stages, durably and at once: from here on the work is begun."""
    staged = unique(run.tmp)
    with explaining(run.root / AGAIN):
        for place in places:
            source, target = run.folder(*place), staged / run.earlier_scores(*place).name
            commit = committed(source)
            assert commit is not None
            target.mkdir(parents=True)
            for name in (NAME, *commit.files):
                shutil.copyfile(source / name, target / name)
            (target / ONLY).write_bytes(json_bytes(with_hash({"only": list(asked.only)})))
        record = {"from": asked.redo, "only": asked.only, "places": places}
        (staged / RECORD).write_bytes(json_bytes(with_hash(record)))
        sync(*staged.rglob("*"), staged)
        staged.rename(run.root / AGAIN)
        sync(run.root)


def begun(run: RunFolder) -> Rescoring | None:
    """What was begun and is not done, None without; what is left of it once it is done is removed. Raises
    RunDamaged."""
    rescoring = begun_in(run)
    if rescoring is not None and not rescoring.places:
        discard(run.root / AGAIN, run.tmp)
        return None
    if fault := next(faults(run), None):
        raise RunDamaged(fault)
    return rescoring


def begun_in(run: RunFolder) -> Rescoring | None:
    """What was begun, with the stages that are not done. Raises RunDamaged."""
    path = run.root / AGAIN / RECORD
    if not path.is_file():
        return None
    record = read_record(path)
    places = frozenset((round_, name) for round_, name in record["places"])
    left = frozenset(place for place in places if run.earlier_scores(*place).is_dir())
    return Rescoring(record["from"], tuple(record["only"]), left)


def read_record(path: Path) -> dict[str, Any]:
    """What was written when the work was begun. Raises RunDamaged."""
    fix = f"Delete {path.parent} and run `raftune resume --from score`: all samples are scored again then."
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunDamaged(f"{path} is not valid JSON. {fix}") from error
    if not isinstance(record, dict) or has_changed(record):
        raise RunDamaged(f"{path} has changed since it was written. {fix}")
    return record


def faults(run: RunFolder) -> Iterator[str]:
    """What is wrong with the scores that unfinished work is to keep."""
    try:
        rescoring = begun_in(run)
        for place in sorted(rescoring.places) if rescoring else ():
            folder = run.earlier_scores(*place)
            commit = committed(folder)
            for name in commit.files if commit is not None else ():
                check_file(folder / name)
            read_only(folder)
    except RunDamaged as error:
        yield first_line(error)


def let_go(run: RunFolder, places: Collection[RoundStage]) -> None:
    """Forgets the scores that these stages were to keep: what they are of is redone."""
    for place in sorted(places):
        discard(run.earlier_scores(*place), run.tmp)


def finished(run: RunFolder) -> None:
    """Removes what is left once every score stage is made anew."""
    begun(run)
