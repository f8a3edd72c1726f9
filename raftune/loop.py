"""RAFT (Algorithm 1, arXiv 2304.06767): generate K samples per prompt, score, keep the best, train, evaluate, repeat.

Each round is a table of stages. A committed stage is not run again, so a first run, a resumed run and a longer run are
the same loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raftune.engines.run_stage import RunContext, run_stage
from raftune.evaluation.history import RunOutcome, best, read_round, should_stop, write_best
from raftune.protocols import Callback
from raftune.results.summary import done_words
from raftune.store.run import RunFolder

__all__ = ["RunContext", "RunOutcome", "train"]


def train(ctx: RunContext, callback: Callback = lambda event, facts: None) -> RunOutcome:
    """Runs every stage that is not committed yet and writes best.json. Returns the best round and why the run ended."""
    config, run, emit = ctx.config, ctx.run, event_log(ctx.run, callback)
    rounds = []
    for round_ in range(config.num_rounds + 1):  # round 0 evaluates the initial model
        emit("round_begin", round=round_, of=config.num_rounds)
        worked = [run_stage(ctx, stage, round_, emit) for stage in ctx.stages(round_)]
        rounds.append(record := read_round(run, round_, guards=config.guards.enabled))
        outcome = replace(best(config, [record.metrics for record in rounds]), reason=done_words(config.num_rounds))
        if any(worked):
            write_best(run, config, outcome)
        ctx.prune(round_, outcome.best)
        emit("round_end", round=round_, metrics=record.metrics, summary=record.selection, alarms=record.alarms)
        if round_ and (reason := should_stop(config, rounds)):
            outcome = replace(outcome, reason=reason)
            break
    write_best(run, config, outcome)
    emit("end", best=outcome.best, rounds=outcome.rounds, reason=outcome.reason)
    return outcome


def event_log(run: RunFolder, callback: Callback) -> Callable[..., None]:
    """A function that reports an event to the callback, and appends it to events.jsonl if it is needed later."""

    def emit(event: str, **facts: Any) -> None:
        if event in ("stage_begin", "stage_end", "stage_stop", "chunk", "end"):
            run.events.add(event, **facts)
        if event != "stage_stop":  # an error is being raised, possibly by the callback
            callback(event, facts)

    return emit
