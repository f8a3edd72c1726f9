"""The rounds: draw K samples for each prompt, score them, keep the best, fit the policy to what was kept, repeat.

Algorithm 1 of the RAFT paper (arXiv 2304.06767), as one walk over a table of stages. A stage that is committed is not
run again, so that a first run, a resumed run and a longer run are the same walk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raftune.config.run import RunConfig
from raftune.evaluation.history import (
    Metrics,
    best_round,
    compared_by,
    reason_of_alarm,
    reason_of_emptiness,
    reason_to_stop,
)
from raftune.protocols import ChunkedStage, JournalEntry, Stage
from raftune.results.summary import alarms_of, done_words, read_json
from raftune.stages.train import NOTHING, REPORT
from raftune.store import pulse
from raftune.store.commit import JOURNAL, with_hash
from raftune.store.files import discard, json_bytes, write_json
from raftune.store.job import Engine, StageJob, note, run_once, seal_chunks, unfinished
from raftune.store.run import RunFolder

Callback = Callable[[str, dict[str, Any]], None]


class RunContext(Protocol):
    """What the loop needs of the composition root: the table of stages, and an engine for their units."""

    run: RunFolder
    config: RunConfig
    engine: Engine

    def stages(self, round_: int) -> list[Stage]: ...
    def job(self, stage: Stage, round_: int) -> StageJob: ...
    def engine_for(self, stage: ChunkedStage) -> Engine: ...
    def prune(self, round_: int, best: int | None) -> None: ...


@dataclass(frozen=True)
class RunOutcome:
    """Where a run ended: rounds done, the round whose model is published, its value, and why it stopped.

    `prompts` are those that the value is the mean of.
    """

    rounds: int
    best: int
    value: float | None
    reason: str
    prompts: int | None = None


def train(ctx: RunContext, observe: Callback = lambda kind, facts: None) -> RunOutcome:
    """Runs what is not committed yet, and publishes the best round."""
    emit = speaker(ctx.run, observe)
    history: list[Metrics] = []
    nothing: list[str] = []
    reason = done_words(ctx.config.num_rounds)
    for round_ in range(ctx.config.num_rounds + 1):
        emit("round_begin", round=round_, of=ctx.config.num_rounds)
        worked = [ensure(ctx, stage, round_, emit) for stage in ctx.stages(round_)]
        history.append(metrics_of(ctx.run, round_))
        outcome = outcome_of(ctx.config, history, reason)
        if any(worked):
            publish(ctx, outcome)
        ctx.prune(round_, outcome.best)
        alarms = alarms_of(ctx.run, round_) if ctx.config.guards.enabled else []
        emit("round_end", round=round_, metrics=history[-1], summary=summary_of(ctx.run, round_), alarms=alarms)
        nothing += [nothing_learned(ctx.run, round_)] if round_ else []
        if round_ and (stop := why_stop(ctx.config, history, alarms, nothing)):
            outcome = replace(outcome, reason=stop)
            break
    publish(ctx, outcome)
    emit("end", best=outcome.best, rounds=outcome.rounds, reason=outcome.reason)
    return outcome


def why_stop(config: RunConfig, history: list[Metrics], alarms: list[dict[str, Any]], nothing: list[str]) -> str | None:
    """Why to end after the last of these rounds, in words; None to go on."""
    if reason := reason_of_emptiness(nothing, config.stop):
        return reason
    reason = reason_to_stop(history, config.stop, config.evaluation.best_by)
    return reason or reason_of_alarm(alarms, config.guards.stop_on)


def ensure(ctx: RunContext, stage: Stage, round_: int, emit: Callable[..., None]) -> bool:
    """Runs the stage unless it is committed; True if it ran."""
    if ctx.run.commit(round_, stage.writes) is not None:
        cleanup(ctx, stage, round_)  # a kill may have come between the COMMIT and this
        return False
    job = ctx.job(stage, round_)
    began = time.perf_counter()
    pulse.clear()
    emit("stage_begin", round=round_, stage=stage.name)
    notes: tuple[str, ...] = ()  # those of chunks are told with each
    try:
        if isinstance(stage, ChunkedStage):
            run_chunks(ctx, job, stage, emit)
        else:
            ctx.engine.rest()
            notes = run_once(job, stage)
    except BaseException:
        seconds = round(time.perf_counter() - began, 4)
        emit("stage_stop", round=round_, stage=stage.name, seconds=seconds)
        raise
    cleanup(ctx, stage, round_)
    seconds = round(time.perf_counter() - began, 4)
    emit("stage_end", round=round_, stage=stage.name, seconds=seconds, notes=list(notes))
    return True


def cleanup(ctx: RunContext, stage: Stage, round_: int) -> None:
    """Removes what only an interrupted stage is continued from: its journal entries, its checkpoints."""
    (ctx.run.folder(round_, stage.writes) / JOURNAL).unlink(missing_ok=True)
    scratch = getattr(stage, "scratch", None)
    if scratch is not None:
        discard(scratch, ctx.run.tmp)


def run_chunks(ctx: RunContext, job: StageJob, stage: ChunkedStage, emit: Callable[..., None]) -> None:
    """Runs the chunks that are missing, wherever the engine runs them, and commits the stage."""
    missing, entries = unfinished(job, stage)
    engine = ctx.engine_for(stage)
    emit("chunks", round=job.round, stage=stage.name, total=len(missing) + len(entries), found=len(entries))
    for entry in engine.run(job, stage, missing):
        note(job, entry)
        entries.append(entry)
        emit("chunk", round=job.round, stage=stage.name, **told(entry))
    seal_chunks(job, entries, engine.failed)


def told(entry: JournalEntry) -> dict[str, Any]:
    return {
        "chunk": entry.chunk,
        "rows": entry.rows,
        "seconds": round(entry.seconds, 4),
        "notes": list(entry.notes),
    }


def outcome_of(config: RunConfig, history: list[Metrics], reason: str) -> RunOutcome:
    """Where the run stands: the best round so far by the held-out value, or the last where nothing was measured."""
    last = len(history) - 1
    best, value = best_round(history, config.evaluation.best_by) or (last, None)
    found = compared_by(history[best], config.evaluation.best_by) if value is not None else None
    return RunOutcome(last, best, value, reason, found.get("n") if found else None)


def publish(ctx: RunContext, outcome: RunOutcome) -> None:
    """Writes best.json, unless it says so already."""
    path = ctx.run.root / "best.json"
    found = with_hash(published(ctx.config, outcome))
    if not path.is_file() or path.read_bytes() != json_bytes(found):
        write_json(ctx.run.tmp, path, found)


def published(config: RunConfig, outcome: RunOutcome) -> dict[str, Any]:
    """What best.json says of this outcome."""
    return {
        "round": outcome.best,
        "by": config.evaluation.best_by if outcome.value is not None else "last round",
        "value": outcome.value,
        "prompts": outcome.prompts,
        "model": f"round-{outcome.best:04d}/model",
        "rounds": outcome.rounds,
    }


def metrics_of(run: RunFolder, round_: int) -> Metrics:
    """The round's committed metrics; empty where evaluation is off."""
    path = run.folder(round_, "evaluate") / "metrics.json"
    return read_json(path)


def nothing_learned(run: RunFolder, round_: int) -> str:
    """Why the round had nothing to learn from and left the policy as it was; empty where it learned."""
    path = run.folder(round_, "model") / REPORT
    report = read_json(path)
    return str(report.get("details", {}).get(NOTHING, ""))


def summary_of(run: RunFolder, round_: int) -> dict[str, Any]:
    """What the round's selection kept and left; empty for the start."""
    path = run.folder(round_, "select") / "summary.json"
    return read_json(path)


def speaker(run: RunFolder, observe: Callback) -> Callable[..., None]:
    """Tells the observer, and writes to events.jsonl what is of use later."""

    def emit(kind: str, **facts: Any) -> None:
        if kind in ("stage_begin", "stage_end", "stage_stop", "chunk", "end"):
            run.events.add(kind, **facts)
        if kind != "stage_stop":  # an error is on its way, and the observer may be what raised it
            observe(kind, facts)

    return emit
