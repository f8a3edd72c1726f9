"""`raftune demo`: the method at work on the bundled model."""

from __future__ import annotations

import json as js
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from raftune.cli.show import Grid, out, say
from raftune.cli.work import go, outcome_json, outcome_words
from raftune.config.load import merge, read_yaml, validate
from raftune.config.run import RunConfig
from raftune.digest import cell, columns_for, held_out_names, rows_of
from raftune.runs import root_of

if TYPE_CHECKING:
    from raftune.build import Assembly

SHOWN = 8


def demo(
    *,
    output_dir: Annotated[str, Parameter(help="The run's directory.")] = "runs/demo",
    fresh: Annotated[
        bool, Parameter(negative="", show_default=False, help="Begin a new run beside an earlier one.")
    ] = False,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the result as JSON.")] = False,
) -> None:
    """Align the bundled model, and show what came of it: under a minute on two CPU cores, no network.

    A tiny assistant, which is rude and of little help about half of the time, learns from a small reward model. Its
    held-out judge is never trained on. The run is a run like any other: every command works on its directory.
    """
    config = recipe(unused(output_dir) if fresh else output_dir)
    outcome, worked = go(config)
    root = root_of(config)
    shown = before_and_after(root, config, outcome.best)
    if json:
        print(js.dumps(outcome_json(root, outcome, worked) | {"by_round": rows_of(root), "shown": shown}))
        return
    by_round(root, held_out_names(config))
    say("")
    say(f"Typical answers to three requests that it never saw: of {SHOWN}, the median by the judge.")
    for example in shown:
        show(example, "judge")
    say("")
    for line in [*outcome_words(root, outcome, worked), "  again     raftune demo --fresh"]:
        say(line)


def recipe(output_dir: str) -> RunConfig:
    """The demo's configuration, from the file that the package brings along."""
    with resources.as_file(resources.files("raftune.starters.text") / "demo.yaml") as path:
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


def before_and_after(root: Path, config: RunConfig, best: int) -> list[dict[str, Any]]:
    """A typical answer of the start and of the best round to each of three held-out prompts.

    Typical: of eight, drawn with the same seeds from both, the one whose held-out score is the median.
    """
    from raftune.build import Assembly
    from raftune.store.run import RunFolder

    folder = RunFolder(root)
    assembly = Assembly(folder, config)
    try:
        before, after = (typical(assembly, folder.folder(round_, "model")) for round_ in (0, best))
    finally:
        assembly.close()
    return [
        {"prompt": prompt, "before": old, "before_score": was, "after": new, "after_score": is_}
        for (prompt, old, was), (_, new, is_) in zip(before, after, strict=True)
    ]


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


def show(example: dict[str, Any], judge: str) -> None:
    from rich.text import Text

    from raftune.plain import one_line

    console = out()
    console.print()
    console.print(Text(one_line(example["prompt"].removeprefix("User: ").removesuffix("Assistant:")), style="bold"))
    for when, style in (("before", "yellow"), ("after", "green")):
        text, score = one_line(example[when]), f"  ({judge} {example[f'{when}_score']:.1f})"
        console.print(Text.assemble((f"  {when:<8}", style), text, (score, "dim")))
