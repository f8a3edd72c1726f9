"""`raftune alarms`: shows the alarms of a run, with the samples that they name."""

from __future__ import annotations

import json as js
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.alarm_output import show
from raftune.cli.output import echo
from raftune.errors import ConfigError
from raftune.results import samples
from raftune.results.summary import alarms_of
from raftune.sanitize import shell_command
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder


def alarms(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *,
    round_: Annotated[int | None, Parameter(name="--round", help="The round; without it, all rounds.")] = None,
    number: Annotated[int, Parameter(name=["--number", "-n"], help="Samples to show per alarm.")] = 3,
    full: Annotated[
        bool, Parameter(negative="", show_default=False, help="Whole completions, not their first line.")
    ] = False,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print JSON lines, one for each alarm.")
    ] = False,
) -> None:
    """Show the alarms of a run, round by round, with their numbers and samples.

    raftune alarms runs/mine
    raftune alarms runs/mine --round 7 -n 8 --full

    An alarm is a reason to look at samples, not a finding. The section `guards` of the configuration holds the
    thresholds, and `guards.stop_on` the alarms that end a run.
    """
    if number < 1:
        raise ConfigError(f"--number must be at least 1; got {number}. Leave it out for 3.")
    folder = RunFolder(run)
    folder.read_config()
    guarded = choose_rounds(folder, round_)
    found = [(r, alarm) for r in guarded for alarm in alarms_of(folder, r)]
    if json:
        for _, alarm in found:
            print(js.dumps(alarm, ensure_ascii=False))
        return
    rounds = f"round {guarded[0]}" if len(guarded) == 1 else f"rounds {samples.span(guarded)}"
    echo(f"{len(found)} alarm{'s' * (len(found) != 1)} in {rounds}", style="dim")
    for r, alarm in found:
        show(folder, r, alarm, number, full)


def choose_rounds(folder: RunFolder, asked: int | None) -> list[int]:
    """The guarded rounds that are meant. Raises ConfigError where there is none."""
    guarded = folder.rounds_with("guard")
    if not guarded and not any(folder.rounds()):
        raise ConfigError(
            f"{folder.root} has no guarded round. Alarms are of rounds that train. "
            f"{how_to_go_on(folder.root, folder.read_config())}"
        )
    if not guarded:
        raise ConfigError(
            f"{folder.root} has no guarded round. "
            f"`{shell_command('raftune', 'resume', folder.root, '--guards.enabled', 'true')}` looks at what is there, "
            "without generating again."
        )
    if asked is not None and asked not in guarded:
        raise ConfigError(f"--round must be one of {samples.span(guarded)}; got {asked}. Choose one of these.")
    return guarded if asked is None else [asked]
