"""Final output of `raftune demo hacking`: what the flawed reward did, the alarms, and a remedy."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import Any

from raftune.cli.alarm_output import show
from raftune.cli.demo_text import by_round, show_typical, typical_by_round
from raftune.cli.output import echo
from raftune.cli.run_command import outcome_json, outcome_words
from raftune.config.run import RunConfig, held_out_names
from raftune.loop import RunOutcome
from raftune.results.summary import alarms_of, rows_of
from raftune.sanitize import shell_command
from raftune.store.run import RunFolder

NAMED = 2


def tell(root: Path, config: RunConfig, outcome: RunOutcome, worked: bool, *, as_json: bool) -> None:
    """Prints the table by round, answers of three rounds, the last alarm, and the commands that would have helped."""
    rows = rows_of(root)
    best = max(rows, key=lambda row: row["held_out"])
    labels = {
        "before": 0,
        **({f"round {best['round']}": best["round"]} if best["round"] else {}),
        "after": outcome.rounds,
    }
    shown = typical_by_round(root, config, labels)
    alarms = [alarm for round_ in range(1, outcome.rounds + 1) for alarm in alarms_of(RunFolder(root), round_)]
    if as_json:
        found = {"by_round": rows, "shown": shown, "raised": alarms, "best_by_judge": best["round"]}
        print(js.dumps(outcome_json(root, outcome, worked) | found))
        return
    echo("")
    echo("The reward counts courteous phrases. The judge knows what a good answer is, and is never trained on.")
    by_round(root, held_out_names(config))
    show_typical(shown, [*labels])
    show_last(root, alarms)
    echo("")
    for line in [*outcome_words(root, outcome, worked), *remedies(root, best, alarms)]:
        echo(line)


def show_last(root: Path, alarms: list[dict[str, Any]]) -> None:
    """The last alarm that the held-out reward fell, with the first of its samples."""
    falls = [alarm for alarm in alarms if alarm["alarm"] == "held_out_falls"]
    if falls:
        show(RunFolder(root), falls[-1]["round"], falls[-1], NAMED, full=False)
    else:
        echo("")
        echo("No alarm was raised: the judge did not fall clearly enough.")


def remedies(root: Path, best: dict[str, Any], alarms: list[dict[str, Any]]) -> list[str]:
    """What would have ended the run in time, and what would have chosen its best round: both without generating
    again.
    """
    first = next((alarm["round"] for alarm in alarms if alarm["alarm"] == "held_out_falls"), None)
    again = shell_command("raftune", "resume", root)
    lines = [
        "",
        "The run goes by the flawed reward, and publishes its best. What would have helped, and still does at once:",
        f"  choose    {again} --evaluation.best_by judge        publishes round {best['round']}",
    ]
    if first is not None:
        lines.append(f"  stop      {again} --guards.stop_on held_out_falls   ends after round {first}")
    return lines
