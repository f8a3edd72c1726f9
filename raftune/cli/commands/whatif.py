"""`raftune rescore` and `raftune select`: what other rewards or rules would keep of a run's samples."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from raftune.analysis.whatif import Difference, WhatIfResult, reselect
from raftune.analysis.whatif import rescore as rescore_run
from raftune.analysis.whatif.difference import SelectionChange
from raftune.analysis.whatif.run import in_words
from raftune.cli.flags import Json, RunDirectory, Tokens, read_run_flags, switch
from raftune.cli.output import PlainTable, echo, out
from raftune.results.samples import answer_text, prompt_text, span
from raftune.runtime.progress import Progress
from raftune.sanitize import counted, one_line, percent

Rounds = Annotated[str, Parameter(name="--round", help="A number, or all.")]
GUTTER = 34


def rescore(
    run: RunDirectory,
    *flags: Tokens,
    round_: Rounds = "all",
    name: Annotated[
        str | None, Parameter(help="Name of the result, in RUN/whatif/NAME; default: the rewards' names.")
    ] = None,
    show: Annotated[
        int, Parameter(help="Number of prompts to show: those that would change most.", validator=Number(gte=0))
    ] = 3,
    as_json: Json = False,
) -> None:
    """Score a run's samples with another reward and show what would be kept; nothing is generated.

    raftune rescore runs/mine --rewards.reward_funcs rewards.py:polite
    raftune rescore runs/mine --rewards.reward_funcs '{"spec": "length", "options": {"target": 20}}' --name shorter
    raftune rescore runs/mine --rewards.reward_funcs a.py:kind --rewards.reward_funcs b.py:brief --name both

    Every field of `rewards` is a flag. The run's rule selects by the new scores, and the two training sets are
    compared. The run is not changed: scores and verdicts are written to RUN/whatif/NAME, and `raftune select RUN
    --scores NAME` can use them. A second call reads the stored result.
    """
    options = ("--round", "--name", "--show", "--json")
    changes = read_run_flags(flags, "rescore", options, "Write --rewards.reward_funcs before it.")
    with Progress() as progress:
        result = rescore_run(run, changes, which=round_, name=name, show=show, observe=progress)
    show_result(result, as_json)


def select(
    run: RunDirectory,
    *flags: Tokens,
    round_: Rounds = "all",
    scores: Annotated[str | None, Parameter(help="Use the scores of this `raftune rescore`: its NAME.")] = None,
    dry_run: Annotated[bool, switch("Write nothing.", "--dry-run")] = False,
    diff: Annotated[bool, switch("Show completions that would be added or removed.")] = False,
    show: Annotated[
        int | None,
        Parameter(help="Prompts that --diff shows: those that would change most [3].", validator=Number(gte=0)),
    ] = None,
    name: Annotated[
        str | None, Parameter(help="Name of the result, in RUN/whatif/NAME; default: the changed settings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Select again from a run's scored samples, with another rule or a smaller K, and compare.

    raftune select runs/mine --selection.rule top_m --selection.m 2 --dry-run --diff
    raftune select runs/mine --sampling.num_generations 4 --dry-run
    raftune select runs/mine --scores judge --selection.rule top_fraction --selection.keep_fraction 0.1

    Every field of `selection` is a flag. --sampling.num_generations uses the first N samples of each prompt, which are
    what the policy would have generated at that K. The run is not changed: verdicts are written to RUN/whatif/NAME, or
    not at all with --dry-run.
    """
    options = ("--round", "--scores", "--dry-run", "--diff", "--show", "--name", "--json")
    changes = read_run_flags(flags, "select", options, "Name another rule by --selection.rule.")
    shown = show if show is not None else 3 if diff else 0
    result = reselect(run, changes, which=round_, name=name, scores=scores, dry_run=dry_run, show=shown)
    show_result(result, as_json)


# -- output ------------------------------------------------------------------------------------------------------------


def show_result(result: WhatIfResult, as_json: bool) -> None:
    difference = result.difference
    if as_json:
        changes = {name: {"before": old, "now": new} for name, (old, new) in result.changes.items()}
        paths = {"run": str(result.run), "folder": result.folder and str(result.folder)}
        print(json.dumps(dataclasses.asdict(result) | paths | {"changes": changes}, ensure_ascii=False))
        return
    settings = in_words(result.changes) if result.changes else "the run's own settings"
    echo(f"{result.run}, round{'s' * (len(result.rounds) > 1)} {span(result.rounds)}: {settings}", "", style="bold")
    show_rounds(difference)
    if (best := difference.best_of).rewards:
        curve = " · ".join(f"{k}: {reward:.3f}" for k, reward in best.rewards.items())
        most = max(best.rewards)
        fewer = [k for k in best.shares if k < most]
        gain = f"; K = {fewer[-1]} gives {percent(best.shares[fewer[-1]])} of the gain of K = {most}" if fewer else ""
        left = f" ({counted(best.left_out, 'prompt')} with a sample without a score left out)" if best.left_out else ""
        echo("", f"Best of k samples by {difference.names[1]}, unbiased: {curve}{gain}{left}.")
    show_largest(difference)
    if difference.empty_prompts:
        echo("", "Prompts that would yield nothing any more:")
    for prompt in difference.empty_prompts:
        echo(f"  round {prompt['round']} · {one_line(prompt_text(prompt['prompt']), 100)}: {prompt['reason']}")
    echo("", *(f"Left out: {missing}." for missing in result.missing))
    if result.folder is None:
        echo("Nothing was written (--dry-run).")
    else:
        where = "Written to" if result.worked else "Done before: it is in"
        echo(f"{where} {result.folder}; the run is as it was.")
    if result.redo:
        echo(result.redo)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_rounds(difference: Difference) -> None:
    def cells(change: SelectionChange) -> Iterator[str]:
        yield "all" if change.round is None else str(change.round)
        yield f"{change.changed}/{change.prompts}"
        for count in (change.before.samples, change.now.samples, change.in_both, change.only_before, change.only_now):
            yield str(count)
        yield f"{change.empty_before} → {change.empty_prompts}"
        if difference.rescored:
            yield from (number(change.before.reward_before), number(change.now.reward_before))
        yield from (number(change.before.reward_now), number(change.now.reward_now))

    old, new = difference.names
    rewards = [f"{old}: before", "now", *([f"{new}: before", "now"] if difference.rescored else [])]
    titles = ("round", "changed", "before", "now", "both", "gone", "new", "empty", *rewards)
    table = PlainTable(*titles, right=range(len(titles)))
    for change in [*difference.rounds, *([difference.all] if len(difference.rounds) > 1 else [])]:
        table.add(*cells(change))
    table.show()
    echo(
        "",
        "  changed: prompts of which something else is kept; before, now, both, gone, new: samples kept",
        "  empty: prompts that yield nothing, before → now; the rest: mean of what is kept, by each reward",
        style="dim",
    )


def show_largest(difference: Difference) -> None:
    """The prompts that would change most, each with its completions: − is removed, + added, = kept in both."""
    if not difference.largest:
        return
    echo(
        "", f"{len(difference.largest)} of {difference.all.changed} prompts that change, those that gain or lose most:"
    )
    console = out()
    width = max(console.width - GUTTER, 20) if console.is_terminal else None
    old, new = difference.names
    for change in difference.largest:
        prompt = one_line(prompt_text(change["prompt"]), width)
        echo("", f"round {change['round']} · {prompt}  {change['margin']:+.3f}", style="bold")
        for sample in change["samples"]:
            was_kept, is_kept = sample["weight_before"] > 0, sample["weight_now"] > 0
            sign, style = ("=", "dim") if was_kept and is_kept else ("−", "red") if was_kept else ("+", "green")
            before = f"{old} {number(sample['score_before'])}  " if difference.rescored else ""
            head = f"  {sign}  {before}{new} {number(sample['score_now'])}  "
            console.print(Text.assemble((head, style), one_line(answer_text(sample["completion"]), width) or "(empty)"))
