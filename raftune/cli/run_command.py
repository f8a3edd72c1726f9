"""Shared by train, resume, evaluate and demo: runs with progress, handles interruption, and prints the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raftune.cli.errors import interruptible
from raftune.config.evaluation import FEWEST_UNITS
from raftune.config.run import RunConfig, held_out_names
from raftune.loop import RunOutcome
from raftune.report import NAME as REPORT
from raftune.results.summary import alarms_of
from raftune.runtime.distributed import launched
from raftune.runtime.progress import Progress
from raftune.runtime.run import root_of, run
from raftune.sanitize import shell_command
from raftune.stages.data import few_words
from raftune.store.run import RunFolder


def work(config: RunConfig, redo: str | None = None, *, only: str | None = None, as_json: bool = False) -> None:
    outcome, worked = run_with_progress(config, redo, only)
    root = root_of(config)
    print(
        json.dumps(outcome_json(root, outcome, worked)) if as_json else "\n".join(outcome_words(root, outcome, worked))
    )


def run_with_progress(config: RunConfig, redo: str | None = None, only: str | None = None) -> tuple[RunOutcome, bool]:
    """Runs the configuration with progress on stderr. Returns the outcome, and whether anything had to be done."""
    with (
        launched(config),
        interruptible(root_of(config)) as watch,
        Progress(held_out=held_out_names(config)) as progress,
    ):

        def observe(kind: str, facts: dict[str, Any]) -> None:
            progress(kind, facts)
            watch(kind, facts)

        outcome = run(config, observe=observe, redo=redo, only=only)
    return outcome, progress.worked


def all_alarms(root: Path, outcome: RunOutcome) -> list[dict[str, Any]]:
    rounds = range(1, outcome.rounds + 1)
    return [alarm | {"round": round_} for round_ in rounds for alarm in alarms_of(RunFolder(root), round_)]


def outcome_json(root: Path, outcome: RunOutcome, worked: bool) -> dict[str, Any]:
    return {
        "run": str(root),
        "rounds": outcome.rounds,
        "best": outcome.best,
        "value": outcome.value,
        "model": str(root / f"round-{outcome.best:04d}" / "model"),
        "report": str(root / REPORT) if (root / REPORT).is_file() else None,
        "alarms": len(all_alarms(root, outcome)),
        "reason": outcome.reason,
        "worked": worked,
    }


def outcome_words(root: Path, outcome: RunOutcome, worked: bool) -> list[str]:
    best = f"round {outcome.best}" if outcome.best else "the start itself"
    if not outcome.best and outcome.rounds:
        best += " (no round was better)"
    if outcome.value is not None:
        best += f", {outcome.value:.3f}"
    elif outcome.best:
        best += " (the last one: none was judged)"
    if outcome.rounds and outcome.prompts is not None and outcome.prompts < FEWEST_UNITS:
        best += f" ({few_words(outcome.prompts)})"
    lines = [
        f"{'Finished' if worked else 'Already finished; nothing to do'}: {outcome.reason}.",
        f"  best      {best}",
        f"  model     {root / f'round-{outcome.best:04d}' / 'model'}",
    ]
    if (root / REPORT).is_file():
        lines.append(f"  look      {root / REPORT}")
    if rounds := list(dict.fromkeys(alarm["round"] for alarm in all_alarms(root, outcome))):
        words = f"round {rounds[0]}" if len(rounds) == 1 else f"{len(rounds)} rounds"
        lines.append(f"  alarms    {words} raised some: {shell_command('raftune', 'alarms', root)}")
    lines.append(f"  samples   {shell_command('raftune', 'samples', root, '--sort', 'best')}")
    lines.append(f"  take      {shell_command('raftune', 'export', root, '--format', 'model', '--out', 'DIR')}")
    return lines
