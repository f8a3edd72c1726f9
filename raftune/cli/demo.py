"""`raftune demo`: the method at work on the bundled model, and what a flawed reward does to it."""

from __future__ import annotations

import json as js
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from raftune.cli.show import Grid, out, say
from raftune.cli.work import go, outcome_json, outcome_words
from raftune.config.load import merge, read_yaml, validate
from raftune.config.run import RunConfig
from raftune.digest import cell, columns_for, held_out_names, rows_of
from raftune.runs import root_of

if TYPE_CHECKING:
    from raftune.build import Assembly

Which = Literal["text", "hacking"]
RECIPES: dict[Which, str] = {"text": "demo.yaml", "hacking": "hacking.yaml"}
SHOWN = 8
STYLES = ("yellow", "green", "red")


def demo(
    which: Annotated[
        Which, Parameter(name="WHICH", help="text: the method at work; hacking: a reward with a flaw, and the alarm.")
    ] = "text",
    *,
    output_dir: Annotated[
        str | None, Parameter(show_default=False, help="The run's directory; without it, runs/demo or runs/hacking.")
    ] = None,
    fresh: Annotated[
        bool, Parameter(negative="", show_default=False, help="Begin a new run beside an earlier one.")
    ] = False,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the result as JSON.")] = False,
) -> None:
    """Align the bundled model, and show what came of it: under a minute on two CPU cores, no network.

    raftune demo
    raftune demo hacking

    A tiny assistant, which is rude and of little help about half of the time, learns from a small reward model. Its
    held-out judge is never trained on. With `hacking` it learns from a reward that counts courteous phrases, which is
    soon better served by phrases than by help. Each is a run like any other: every command works on its directory.
    """
    place = output_dir or f"runs/{Path(RECIPES[which]).stem}"
    config = recipe(unused(place) if fresh else place, which)
    outcome, worked = go(config)
    root = root_of(config)
    if which == "hacking":
        from raftune.cli.hacking import tell

        tell(root, config, outcome, worked, as_json=json)
        return
    shown = typical_by_round(root, config, {"before": 0, "after": outcome.best})
    if json:
        print(js.dumps(outcome_json(root, outcome, worked) | {"by_round": rows_of(root), "shown": shown}))
        return
    by_round(root, held_out_names(config))
    show_typical(shown, ("before", "after"))
    say("")
    for line in [*outcome_words(root, outcome, worked), "  again     raftune demo --fresh"]:
        say(line)


def recipe(output_dir: str, which: Which = "text") -> RunConfig:
    """A demonstration's configuration, from the file that the package brings along."""
    with resources.as_file(resources.files("raftune.starters.text") / RECIPES[which]) as path:
        return validate(merge([read_yaml(path), {"output_dir": output_dir}]))


def unused(output_dir: str) -> str:
    """The directory, or the first of DIR-2, DIR-3, … that does not exist."""
    path, number = Path(output_dir), 1
    while path.exists():
        number += 1
        path = Path(f"{output_dir}-{number}")
    return str(path)


def by_round(root: Path, judges: tuple[str, ...]) -> None:
    """The table by round, and what its columns mean."""
    rows = rows_of(root)
    columns = columns_for(rows, judges)
    grid = Grid(*(column.title for column in columns), right=frozenset(range(len(columns))))
    for row in rows:
        grid.add(*(cell(column, row) for column in columns))
    say("")
    grid.show()
    say("")
    for column in columns[1:]:
        say(f"  {column.title}: {column.meaning}", style="dim")


def typical_by_round(root: Path, config: RunConfig, rounds: dict[str, int]) -> list[dict[str, Any]]:
    """A typical answer of each of these rounds, by their labels, to each of three held-out prompts.

    Typical: of eight, drawn with the same seeds in every round, the one whose held-out score is the median.
    """
    from raftune.build import Assembly
    from raftune.store.run import RunFolder

    folder = RunFolder(root)
    assembly = Assembly(folder, config)
    try:
        answers = {label: typical(assembly, folder.folder(round_, "model")) for label, round_ in rounds.items()}
    finally:
        assembly.close()
    shown: list[dict[str, Any]] = [{"prompt": prompt} for prompt, _, _ in next(iter(answers.values()))]
    for label, found in answers.items():
        for example, (_, answer, score) in zip(shown, found, strict=True):
            example |= {label: answer, f"{label}_score": score}
    return shown


def typical(assembly: Assembly, model: Path) -> list[tuple[str, str, float]]:
    """Of each shown prompt: its text, the median answer, and that answer's score."""
    from raftune.protocols import Unit
    from raftune.records import Prompt, derive_seed, prompt_ids
    from raftune.starters.text import SHOW, judge

    prompts = tuple(Prompt(name, text) for name, text in zip(prompt_ids(SHOW), SHOW, strict=True))
    seeds = tuple(tuple(derive_seed("show", prompt.id, k) for k in range(SHOWN)) for prompt in prompts)
    drawn = assembly.policies.at(model).draw(Unit(0, "show", "show", prompts, seeds, SHOWN * len(prompts)))
    found = []
    for prompt in prompts:
        answers = [sample.completion for sample in drawn if sample.prompt_id == prompt.id]
        scores = [score or 0.0 for score in judge([prompt.content] * len(answers), answers)]
        score, answer = sorted(zip(scores, answers, strict=True))[len(answers) // 2]
        found.append((str(prompt.content), answer, score))
    return found


def show_typical(shown: list[dict[str, Any]], labels: Sequence[str]) -> None:
    """The typical answers, prompt by prompt, each under its label and with the judge's score."""
    from rich.text import Text

    from raftune.plain import one_line

    console = out()
    say("")
    say(f"Typical answers to three requests that it never saw: of {SHOWN}, the median by the judge.")
    for example in shown:
        console.print()
        console.print(Text(one_line(example["prompt"].removeprefix("User: ").removesuffix("Assistant:")), style="bold"))
        for label, style in zip(labels, STYLES, strict=False):
            text, score = one_line(example[label]), f"  (judge {example[f'{label}_score']:.1f})"
            console.print(Text.assemble((f"  {label:<9}", style), text, (score, "dim")))
