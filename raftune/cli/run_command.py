"""Shared by train, resume and demo: runs with progress, handles interruption, and prints the result."""

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
from raftune.runtime.progress import Progress
from raftune.runtime.run import root_of, run
from raftune.sanitize import shell_command
from raftune.stages.data import few_words
from raftune.store.run import RunFolder


def work(config: RunConfig, redo: str | None = None, *, only: str | None = None, as_json: bool = False) -> RunOutcome:
    """Runs the configuration and prints its outcome."""
    outcome, worked = go(config, redo, only)
    root = root_of(config)
    if as_json:
        print(json.dumps(outcome_json(root, outcome, worked)))
    else:
        print("\n".join(outcome_words(root, outcome, worked)))
    return outcome


def go(config: RunConfig, redo: str | None = None, only: str | None = None) -> tuple[RunOutcome, bool]:
    """Runs the configuration under the eyes of a person; whether anything had to be done."""
    root = root_of(config)
    with interruptible(root) as watch, Progress(held_out=held_out_names(config)) as progress:

        def observe(kind: str, facts: dict[str, Any]) -> None:
            progress(kind, facts)
            watch(kind, facts)

        outcome = run(config, observe=observe, redo=redo, only=only)
    return outcome, progress.worked


def outcome_json(root: Path, outcome: RunOutcome, worked: bool) -> dict[str, Any]:
    alarms = [alarm for round_ in range(1, outcome.rounds + 1) for alarm in alarms_of(RunFolder(root), round_)]
    return {
        "run": str(root),
        "rounds": outcome.rounds,
        "best": outcome.best,
        "value": outcome.value,
        "model": str(model_of(root, outcome)),
        "report": str(root / REPORT) if (root / REPORT).is_file() else None,
        "alarms": len(alarms),
        "reason": outcome.reason,
        "worked": worked,
    }


def outcome_words(root: Path, outcome: RunOutcome, worked: bool) -> list[str]:
    """Where the run ended, and what to do with it."""
    unjudged = " (the last one: none was judged)" * (outcome.best > 0)
    value = unjudged if outcome.value is None else f", {outcome.value:.3f}"
    if outcome.rounds and outcome.prompts is not None and outcome.prompts < FEWEST_UNITS:
        value += f" ({few_words(outcome.prompts)})"
    best = (
        f"round {outcome.best}"
        if outcome.best
        else f"the start itself{' (no round was better)' * (outcome.rounds > 0)}"
    )
    return [
        f"{'Finished' if worked else 'Already finished; nothing to do'}: {outcome.reason}.",
        f"  best      {best}{value}",
        f"  model     {model_of(root, outcome)}",
        *([f"  look      {page}"] if (page := root / REPORT).is_file() else []),
        *alarm_words(root, outcome),
        f"  samples   {shell_command('raftune', 'samples', root, '--sort', 'best')}",
        f"  take      {shell_command('raftune', 'export', root, '--format', 'model', '--out', 'DIR')}",
    ]


def alarm_words(root: Path, outcome: RunOutcome) -> list[str]:
    """How many rounds raised alarms, and what shows them; nothing where none did."""
    rounds = [round_ for round_ in range(1, outcome.rounds + 1) if alarms_of(RunFolder(root), round_)]
    if not rounds:
        return []
    raised = f"round {rounds[0]}" if len(rounds) == 1 else f"{len(rounds)} rounds"
    return [f"  alarms    {raised} raised some: {shell_command('raftune', 'alarms', root)}"]


def model_of(root: Path, outcome: RunOutcome) -> Path:
    return root / f"round-{outcome.best:04d}" / "model"
