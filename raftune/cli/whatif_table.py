"""Output of rescore and select: the table by round, changed completions, and the next command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from rich.text import Text

from raftune.analysis.whatif import Difference, WhatIfResult
from raftune.analysis.whatif.difference import BestOfEstimate, SelectionChange
from raftune.analysis.whatif.folder import in_words
from raftune.cli.output import PlainTable, echo, out
from raftune.results.samples import answer_text, prompt_text, span
from raftune.sanitize import counted, one_line, percent

GUTTER = 34


def show_outcome(found: WhatIfResult, *, as_json: bool) -> None:
    """The outcome for a person, or for a program."""
    if as_json:
        print(json.dumps(outcome_json(found), ensure_ascii=False))
        return
    changes = in_words(found.changes) if found.changes else "the run's own settings"
    echo(f"{found.run}, round{'s' * (len(found.rounds) > 1)} {span(found.rounds)}: {changes}", style="bold")
    echo("")
    by_round(found.difference)
    if best := best_of_words(found.difference.best_of, found.difference.names[1]):
        echo("")
        echo(best)
    show_largest(found.difference)
    show_starved(found.difference)
    echo("")
    for line in ending(found):
        echo(line)


def outcome_json(found: WhatIfResult) -> dict[str, Any]:
    """Everything that was found, as plain data."""
    plain = dataclasses.asdict(found)
    changes = {name: {"before": old, "now": new} for name, (old, new) in found.changes.items()}
    return plain | {"run": str(found.run), "folder": found.folder and str(found.folder), "changes": changes}


def by_round(difference: Difference) -> None:
    """One line a round, and one for all."""
    old, new = difference.names
    rewards = [f"{old}: before", "now", *([f"{new}: before", "now"] if difference.rescored else [])]
    titles = ("round", "changed", "before", "now", "both", "gone", "new", "starved", *rewards)
    grid = PlainTable(*titles, right=frozenset(range(len(titles))))
    for change in [*difference.rounds, *([difference.all] if len(difference.rounds) > 1 else [])]:
        grid.add(*cells(change, rescored=difference.rescored))
    grid.show()
    echo("")
    echo("  changed: prompts of which something else is kept; before, now, both, gone, new: samples kept", style="dim")
    echo(
        "  starved: prompts that yield nothing, before → now; the rest: mean of what is kept, by each reward",
        style="dim",
    )


def cells(change: SelectionChange, *, rescored: bool) -> Iterator[str]:
    yield "all" if change.round is None else str(change.round)
    yield f"{change.changed}/{change.prompts}"
    for count in (change.before.samples, change.now.samples, change.in_both, change.only_before, change.only_now):
        yield str(count)
    yield f"{change.starved_before} → {change.empty_prompts}"
    if rescored:
        yield from (value(change.before.reward_before), value(change.now.reward_before))
    yield from (value(change.before.reward_now), value(change.now.reward_now))


def value(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"


def best_of_words(best: BestOfEstimate, name: str) -> str:
    """What each k would have given of what was generated."""
    if not best.rewards:
        return ""
    curve = " · ".join(f"{k}: {reward:.3f}" for k, reward in best.rewards.items())
    most = max(best.rewards)
    half = [k for k in best.shares if k < most]
    worth = f"; K = {half[-1]} gives {percent(best.shares[half[-1]])} of the gain of K = {most}" if half else ""
    left = f" ({counted(best.left_out, 'prompt')} with a sample without a score left out)" if best.left_out else ""
    return f"Best of k samples by {name}, unbiased: {curve}{worth}{left}."


def show_largest(difference: Difference) -> None:
    """The prompts that would change most, with the answers that go and come."""
    if not difference.largest:
        return
    echo("")
    echo(f"{len(difference.largest)} of {difference.all.changed} prompts that change, those that gain or lose most:")
    console = out()
    width = max(console.width - GUTTER, 20) if console.is_terminal else None
    for change in difference.largest:
        echo("")
        prompt = one_line(prompt_text(change["prompt"]), width)
        echo(f"round {change['round']} · {prompt}  {change['margin']:+.3f}", style="bold")
        for sample in change["samples"]:
            console.print(line_of(sample, difference, width))


def line_of(sample: dict[str, Any], difference: Difference, width: int | None) -> Text:
    """− for what goes, + for what comes, = for what stays; its scores, its words."""
    was, is_ = sample["weight_before"] > 0, sample["weight_now"] > 0
    sign, style = ("=", "dim") if was and is_ else ("−", "red") if was else ("+", "green")
    old, new = difference.names
    scores = f"{old} {value(sample['score_before'])}  " if difference.rescored else ""
    head = f"  {sign}  {scores}{new} {value(sample['score_now'])}  "
    return Text.assemble((head, style), one_line(answer_text(sample["completion"]), width) or "(empty)")


def show_starved(difference: Difference) -> None:
    if not difference.empty_prompts:
        return
    echo("")
    echo("Prompts that would yield nothing any more:")
    for prompt in difference.empty_prompts:
        echo(f"  round {prompt['round']} · {one_line(prompt_text(prompt['prompt']), 100)}: {prompt['reason']}")


def ending(found: WhatIfResult) -> Iterator[str]:
    """What could not be read, where it lies, and how to really do so."""
    for missing in found.missing:
        yield f"Left out: {missing}."
    if found.folder is None:
        yield "Nothing was written (--dry-run)."
    else:
        yield f"{'Written to' if found.worked else 'Done before: it lies in'} {found.folder}; the run is as it was."
    if found.redo:
        yield found.redo
