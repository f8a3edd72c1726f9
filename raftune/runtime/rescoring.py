"""`--only`: scores samples of some statuses again and keeps all other scores.

The committed scores are copied to again/ before anything is set aside, in one rename. After that, `resume` completes
the work, and a stage that is committed again removes its copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

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
    """The statuses to score again, and the score stages whose other scores are kept."""

    redo: str
    only: tuple[str, ...]
    places: frozenset[RoundStage] = frozenset()

    def not_set_aside(self, run: RunFolder) -> set[RoundStage]:
        """The stages that are still as they were when the work was started."""
        if not (run.root / AGAIN).is_dir():
            return set(self.places)
        present = (stage for stage in self.places if run.is_committed(*stage))
        return {stage for stage in present if sha256_of(run.earlier_scores(*stage) / NAME) == run.commit_hash(*stage)}


def statuses(only: str | None, redo: str | None, run: RunFolder) -> tuple[str, ...]:
    """The statuses that `--only` names, sorted. Raises ConfigError."""
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
    runtime: Runtime, table: Iterable[tuple[int, Stage]], first: Sequence[RoundStage], redo: str, only: Sequence[str]
) -> Rescoring:
    """The score stages of these names, from these rounds on, that hold samples of the statuses; and those that are
    stale because the rewards were repaired, which keep their scores too.

    Raises ConfigError where there is no such sample, where a name is of another stage, and where the rewards now have
    other names.
    """
    run, stages, any_match = runtime.run, set(), False
    start = min(round_ for round_, _ in first)
    for round_, stage in table:
        named = any(round_ >= from_round and stage.name == name for from_round, name in first)
        if named and not isinstance(stage, ScoreStage):
            raise ConfigError(
                f"--only must go with --from score, evaluation-score or evaluation-judge; got --from {redo}. "
                "Leave --only out, or redo from score."
            )
        commit = run.commit(round_, stage.writes) if isinstance(stage, ScoreStage) else None
        if commit is None or not isinstance(stage, ScoreStage):
            continue
        shards = [run.folder(round_, stage.writes) / name for name in commit.files if name.endswith(".parquet")]
        status_columns = {path: [n for n in column_names(path) if n.startswith("status/")] for path in shards}
        matches = named and any(
            not statuses_in(row).isdisjoint(only)
            for path, columns in status_columns.items()
            for row in read_table(path, columns).to_pylist()
        )
        any_match = any_match or matches
        key = stage_key(stage.name, fields_of(stage, runtime.plain), hashes_of(run, stage, round_))
        if matches or ((stage.writes != "score" or round_ >= start) and key != commit.key):
            now = set(stage.rewards().names)
            for path, columns in status_columns.items():
                before = {name.removeprefix("status/") for name in columns}
                if before != now:
                    raise ConfigError(
                        f"--only must keep the scores of the same rewards; {path.parent} holds those of "
                        f"{', '.join(sorted(before))}, and the rewards are {', '.join(sorted(now))} now. Leave --only "
                        "out."
                    )
            stages.add((round_, stage.writes))
    if not any_match:
        raise ConfigError(
            f"--only must name a status that a sample has; got {','.join(only)}, and with --from {redo} "
            "there is no such sample. Nothing was changed."
        )
    return Rescoring(redo, tuple(only), frozenset(stages))


def begin(run: RunFolder, rescoring: Rescoring, stages: Sequence[RoundStage]) -> None:
    """Copies the scores of these stages, durably and in one rename: from here on the work is started."""
    staged = unique(run.tmp)
    with explaining(run.root / AGAIN):
        for stage in stages:
            source, target = run.folder(*stage), staged / run.earlier_scores(*stage).name
            commit = committed(source)
            assert commit is not None
            target.mkdir(parents=True)
            for name in (NAME, *commit.files):
                shutil.copyfile(source / name, target / name)
            (target / ONLY).write_bytes(json_bytes(with_hash({"only": list(rescoring.only)})))
        record = {"from": rescoring.redo, "only": rescoring.only, "places": stages}
        (staged / RECORD).write_bytes(json_bytes(with_hash(record)))
        sync(*staged.rglob("*"), staged)
        staged.rename(run.root / AGAIN)
        sync(run.root)


def unfinished(run: RunFolder) -> Rescoring | None:
    """The work that was started and is not done; removes what is left of finished work. Raises RunDamaged."""
    rescoring = _read(run)
    if rescoring is not None and not rescoring.places:
        discard(run.root / AGAIN, run.tmp)
        return None
    if fault := next(faults(run), None):
        raise RunDamaged(fault)
    return rescoring


def _read(run: RunFolder) -> Rescoring | None:
    """The work that was started, with the stages that are not done. Raises RunDamaged."""
    path = run.root / AGAIN / RECORD
    if not path.is_file():
        return None
    fix = f"Delete {path.parent} and run `raftune resume --from score`: all samples are scored again then."
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunDamaged(f"{path} is not valid JSON. {fix}") from error
    if not isinstance(record, dict) or has_changed(record, "places", "from"):
        raise RunDamaged(f"{path} has changed since it was written. {fix}")
    stages = frozenset((round_, name) for round_, name in record["places"])
    unfinished_stages = frozenset(stage for stage in stages if run.earlier_scores(*stage).is_dir())
    return Rescoring(record["from"], tuple(record["only"]), unfinished_stages)


def faults(run: RunFolder) -> Iterator[str]:
    """What is wrong with the scores that unfinished work is to keep."""
    try:
        rescoring = _read(run)
        for stage in sorted(rescoring.places) if rescoring else ():
            folder = run.earlier_scores(*stage)
            commit = committed(folder)
            for name in commit.files if commit is not None else ():
                check_file(folder / name)
            read_only(folder)
    except RunDamaged as error:
        yield first_line(error)
