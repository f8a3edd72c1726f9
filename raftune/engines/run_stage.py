"""Runs one stage of a round unless it is committed: as a whole, or chunk by chunk on an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from raftune.config.run import RunConfig
from raftune.protocols import ChunkedStage, Stage
from raftune.store import pulse
from raftune.store.commit import JOURNAL
from raftune.store.files import discard
from raftune.store.job import Engine, StageJob, note, run_once, seal_chunks, unfinished
from raftune.store.run import RunFolder


class RunContext(Protocol):
    """A run as the loop needs it: its folder, its configuration, the stages of each round, the engine of each stage."""

    run: RunFolder
    config: RunConfig
    engine: Engine

    def stages(self, round_: int) -> list[Stage]: ...
    def job(self, stage: Stage, round_: int) -> StageJob: ...
    def engine_for(self, stage: ChunkedStage) -> Engine: ...
    def prune(self, round_: int, best: int | None) -> None:
        """Deletes the weights and latents that the configuration does not keep after this round."""
        ...


def run_stage(ctx: RunContext, stage: Stage, round_: int, emit: Callable[..., None]) -> bool:
    """Runs the stage unless it is committed. Returns whether it ran."""
    if ctx.run.commit(round_, stage.writes) is not None:
        cleanup(ctx, stage, round_)  # a kill may have come between the manifest and the clean-up
        return False
    job = ctx.job(stage, round_)
    started = time.perf_counter()
    pulse.clear()
    emit("stage_begin", round=round_, stage=stage.name)
    notes: tuple[str, ...] = ()  # a chunk's notes are reported with the chunk
    try:
        if isinstance(stage, ChunkedStage):
            missing, entries = unfinished(job, stage)
            engine = ctx.engine_for(stage)
            total = len(missing) + len(entries)
            emit("chunks", round=round_, stage=stage.name, total=total, found=len(entries))
            for entry in engine.run(job, stage, missing):
                note(job, entry)
                entries.append(entry)
                facts = {"chunk": entry.chunk, "rows": entry.rows, "seconds": round(entry.seconds, 4)}
                emit("chunk", round=round_, stage=stage.name, **facts, notes=list(entry.notes))
            seal_chunks(job, entries, engine.failed)
        else:
            ctx.engine.rest()
            notes = run_once(job, stage)
    except BaseException:
        emit("stage_stop", round=round_, stage=stage.name, seconds=round(time.perf_counter() - started, 4))
        raise
    cleanup(ctx, stage, round_)
    seconds = round(time.perf_counter() - started, 4)
    emit("stage_end", round=round_, stage=stage.name, seconds=seconds, notes=list(notes))
    return True


def cleanup(ctx: RunContext, stage: Stage, round_: int) -> None:
    """Deletes what only an interrupted stage needs: its journal and its checkpoints."""
    (ctx.run.folder(round_, stage.writes) / JOURNAL).unlink(missing_ok=True)
    scratch = getattr(stage, "scratch", None)
    if scratch is not None:
        discard(scratch, ctx.run.tmp)
