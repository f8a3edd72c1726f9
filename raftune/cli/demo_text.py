"""Final output of the text demos: the table by round, and typical completions before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.cli.output import PlainTable, echo, out
from raftune.config.run import RunConfig
from raftune.results.summary import cell, columns_for, rows_of

if TYPE_CHECKING:
    from raftune.runtime.assembly import Runtime

SHOWN = 8
STYLES = ("yellow", "green", "red")


def by_round(root: Path, judges: tuple[str, ...]) -> None:
    """The table by round, and what its columns mean."""
    rows = rows_of(root)
    columns = columns_for(rows, judges)
    grid = PlainTable(*(column.title for column in columns), right=frozenset(range(len(columns))))
    for row in rows:
        grid.add(*(cell(column, row) for column in columns))
    echo("")
    grid.show()
    echo("")
    for column in columns[1:]:
        echo(f"  {column.title}: {column.meaning}", style="dim")


def typical_by_round(root: Path, config: RunConfig, rounds: dict[str, int]) -> list[dict[str, Any]]:
    """A typical answer of each of these rounds, by their labels, to each of three held-out prompts.

    Typical: of eight, generated with the same seeds in every round, the one whose held-out score is the median.
    """
    from raftune.runtime.assembly import Runtime
    from raftune.store.run import RunFolder

    folder = RunFolder(root)
    assembly = Runtime(folder, config)
    try:
        answers = {label: typical(assembly, folder.folder(round_, "model")) for label, round_ in rounds.items()}
    finally:
        assembly.close()
    shown: list[dict[str, Any]] = [{"prompt": prompt} for prompt, _, _ in next(iter(answers.values()))]
    for label, found in answers.items():
        for example, (_, answer, score) in zip(shown, found, strict=True):
            example |= {label: answer, f"{label}_score": score}
    return shown


def typical(assembly: Runtime, model: Path) -> list[tuple[str, str, float]]:
    """Of each shown prompt: its text, the median answer, and that answer's score."""
    from raftune.protocols import Chunk
    from raftune.records import Prompt, derive_seed, prompt_ids
    from raftune.starters.text import SHOW, judge

    prompts = tuple(Prompt(name, text) for name, text in zip(prompt_ids(SHOW), SHOW, strict=True))
    seeds = tuple(tuple(derive_seed("show", prompt.id, k) for k in range(SHOWN)) for prompt in prompts)
    drawn = assembly.policies.at(model).generate(Chunk(0, "show", "show", prompts, seeds, SHOWN * len(prompts)))
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

    from raftune.sanitize import one_line

    console = out()
    echo("")
    echo(f"Typical answers to three requests that it never saw: of {SHOWN}, the median by the judge.")
    for example in shown:
        console.print()
        console.print(Text(one_line(example["prompt"].removeprefix("User: ").removesuffix("Assistant:")), style="bold"))
        for label, style in zip(labels, STYLES, strict=False):
            text, score = one_line(example[label]), f"  (judge {example[f'{label}_score']:.1f})"
            console.print(Text.assemble((f"  {label:<9}", style), text, (score, "dim")))
