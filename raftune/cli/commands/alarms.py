"""`raftune alarms`: shows the alarms of a run, with the samples that they name."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from raftune.cli.flags import RunDirectory, switch
from raftune.cli.output import echo
from raftune.cli.samples_output import show_alarm
from raftune.errors import ConfigError
from raftune.results.samples import span
from raftune.results.summary import alarms_of
from raftune.sanitize import counted, shell_command
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder


def alarms(
    run: RunDirectory,
    *,
    round_: Annotated[int | None, Parameter(name="--round", help="The round; without it, all rounds.")] = None,
    number: Annotated[
        int, Parameter(name=["--number", "-n"], help="Samples to show per alarm.", validator=Number(gte=1))
    ] = 3,
    full: Annotated[bool, switch("Whole completions, not their first line.")] = False,
    as_json: Annotated[bool, switch("Print JSON lines, one for each alarm.", "--json")] = False,
) -> None:
    """Show the alarms of a run, round by round, with their numbers and samples.

    raftune alarms runs/mine
    raftune alarms runs/mine --round 7 -n 8 --full

    An alarm is a reason to look at samples, not a finding. The section `guards` of the configuration holds the
    thresholds, and `guards.stop_on` the alarms that end a run.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    rounds = folder.rounds_with("guard")
    if not rounds and not any(folder.rounds()):
        fix = how_to_go_on(folder.root, config)
        raise ConfigError(f"{folder.root} has no guarded round. Alarms are of rounds that train. {fix}")
    if not rounds:
        command = shell_command("raftune", "resume", folder.root, "--guards.enabled", "true")
        raise ConfigError(
            f"{folder.root} has no guarded round. `{command}` looks at what is there, without generating again."
        )
    if round_ is not None and round_ not in rounds:
        raise ConfigError(f"--round must be one of {span(rounds)}; got {round_}. Choose one of these.")
    rounds = rounds if round_ is None else [round_]
    raised = [(r, alarm) for r in rounds for alarm in alarms_of(folder, r)]
    if as_json:
        for _, alarm in raised:
            print(json.dumps(alarm, ensure_ascii=False))
        return
    where = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {span(rounds)}"
    echo(f"{counted(len(raised), 'alarm')} in {where}", style="dim")
    for r, alarm in raised:
        show_alarm(folder, r, alarm, number, full)
