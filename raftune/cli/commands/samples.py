"""`raftune samples`: shows a round's samples, prompt by prompt."""

from __future__ import annotations

import heapq
import json as js
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from rich.text import Text

from raftune.cli.output import echo, out
from raftune.cli.save_images import check_folder, save_pictures, sheet_of
from raftune.errors import ConfigError
from raftune.records import EXTRA, Row, extras_of
from raftune.results import samples as ledger
from raftune.results.samples import prompt_text
from raftune.sanitize import counted, harmless, one_line
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder

PromptRows = list[Row]
Sort = Literal["best", "worst", "margin", "order"]
GUTTER = 12


def samples(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *,
    round_: Annotated[int | None, Parameter(name="--round", help="The round; default: the last one.")] = None,
    held_out: Annotated[bool, Parameter(negative="", show_default=False, help="Show the held-out samples.")] = False,
    prompt: Annotated[str | None, Parameter(help="Only prompts that contain this text, or have this id.")] = None,
    sort: Annotated[Sort, Parameter(help="Order of the prompts; margin: best minus mean.")] = "order",
    number: Annotated[int, Parameter(name=["--number", "-n"], help="Prompts to show.")] = 3,
    full: Annotated[
        bool, Parameter(negative="", show_default=False, help="Whole completions, not their first line.")
    ] = False,
    save: Annotated[
        str | None, Parameter(help="Save the shown images in this new folder, with metadata.jsonl.")
    ] = None,
    json: Annotated[
        bool, Parameter(negative="", show_default=False, help="Print JSON lines, one for each sample.")
    ] = False,
) -> None:
    """Show a round's samples, with scores, verdicts (★: kept) and reasons.

    raftune samples runs/mine --round 3 --sort margin -n 5
    raftune samples runs/mine --prompt "birthday" --held-out
    raftune samples runs/images --sort best -n 20 --save best

    An image is named by the SHA-256 of its PNG file, of which the beginning is shown.
    """
    if number < 1:
        raise ConfigError(f"--number must be at least 1; got {number}. Leave it out for 3.")
    if save is not None:
        check_folder(Path(save))
    folder = RunFolder(run)
    folder.read_config()
    chosen, held_out = choose_round(folder, round_, held_out)
    chunks = ledger.held_out_chunks(folder, chosen) if held_out else ledger.training_chunks(folder, chosen)
    groups = (
        group for chunk in chunks for group in ledger.by_prompt(chunk) if prompt is None or matches(group, prompt)
    )
    total, shown = pick(groups, sort, number)
    if not total and prompt is not None:
        raise ConfigError(f"--prompt: no prompt of round {chosen} has {prompt!r} in its text or as its id.")
    saved = 0 if save is None else save_pictures((s for group in shown for s in group), Path(save), chosen)
    if json:
        for sample in (sample for group in shown for sample in group):
            facts = {"completion": ledger.readable(sample["completion"]), "round": chosen, "held_out_prompt": held_out}
            logged = {f"{EXTRA}{name}": value for name, value in extras_of(sample).items()}
            print(js.dumps(sample | logged | facts, ensure_ascii=False))
        return
    what = "held-out prompts" if held_out else "prompts"
    order = {"order": "in order", "best": "best first", "worst": "worst first", "margin": "largest margin first"}[sort]
    echo(f"round {chosen}, {len(shown)} of {total} {what}, {order}", style="dim")
    for group in shown:
        show(group, full)
    if save is not None:
        echo("")
        echo(f"Wrote {counted(saved, 'image')} and metadata.jsonl to {save}.")
        echo(f"All at a glance: {sheet_of(Path(save))}")


def choose_round(folder: RunFolder, asked: int | None, held_out: bool) -> tuple[int, bool]:
    """The round to show, and whether its held-out samples are meant: the start has no others."""
    judged = folder.rounds_with("evaluate/score")
    known = judged if held_out or asked == 0 else ledger.training_rounds(folder)
    if not known and judged and asked is None:
        return judged[-1], True
    if not known:
        raise ConfigError(f"{folder.root} has no such samples. {how_to_go_on(folder.root, folder.read_config())}")
    if asked is not None and asked not in known:
        raise ConfigError(f"--round must be one of {ledger.span(known)}; got {asked}. Choose one of these.")
    return (known[-1] if asked is None else asked), held_out or asked == 0


def matches(group: PromptRows, wanted: str) -> bool:
    """Whether the prompt bears this id, or holds this text in any case."""
    return group[0]["prompt_id"].startswith(wanted) or wanted.casefold() in prompt_text(group[0]["prompt"]).casefold()


def pick(groups: Iterator[PromptRows], sort: Sort, number: int) -> tuple[int, list[PromptRows]]:
    """How many prompts there are, and the first of them in the wanted order; only these are held in memory."""
    count = 0

    def counted() -> Iterator[tuple[float, int, PromptRows]]:
        nonlocal count
        for group in groups:
            count += 1
            yield KEYS[sort](group), count, group

    first = heapq.nsmallest(number, counted(), key=lambda item: item[:2])
    return count, [group for _, _, group in first]


def by_best(group: PromptRows) -> float:
    return -max((s["score"] for s in ledger.usable(group)), default=float("-inf"))


def by_worst(group: PromptRows) -> float:
    return min((s["score"] for s in ledger.usable(group)), default=float("-inf"))


def by_margin(group: PromptRows) -> float:
    scores = [s["score"] for s in ledger.usable(group)]
    return sum(scores) / len(scores) - max(scores) if scores else float("inf")


KEYS: dict[str, Callable[[PromptRows], float]] = {
    "best": by_best,
    "worst": by_worst,
    "margin": by_margin,
    "order": lambda _: 0.0,
}


def show(group: PromptRows, full: bool) -> None:
    """The prompt, and the strip of its samples, best first."""
    console = out()
    console.print()
    console.print(
        Text.assemble((one_line(prompt_text(group[0]["prompt"])), "bold"), (f"  {group[0]['prompt_id']}", "dim"))
    )
    width = None if full or not console.is_terminal else max(console.width - GUTTER, 20)
    for sample in sorted(group, key=lambda s: (s["score"] is None, -(s["score"] or 0.0), s["k"])):
        for line in lines_of(sample, width, full):
            console.print(line)


def lines_of(sample: Row, width: int | None, full: bool) -> Iterator[Text]:
    """★ where it was kept, its score, its text, and beneath it the reason, the parts and where it came from."""
    kept = (sample.get("weight") or 0) > 0
    score = "–" if sample["score"] is None else f"{sample['score']:.3f}"
    head = Text.assemble(("★ " if kept else "  ", "bold yellow"), (f"{score:>8}  ", "green" if kept else ""))
    text = ledger.answer_text(sample["completion"])
    shown = harmless(text).replace("\n", "\n" + " " * GUTTER) if full else one_line(text, width)
    yield head + Text(shown or "(empty)", style="" if shown else "dim")
    yield Text(" " * GUTTER + " · ".join(remarks(sample)), style="dim")


def remarks(sample: Row) -> Iterator[str]:
    """What is on record about the sample besides its text."""
    if sample.get("reason"):
        yield str(sample["reason"])
    if sample.get("held_out") is not None:
        yield f"held out {sample['held_out']:.3f}"
    parts = {name.removeprefix("rewards/"): value for name, value in sample.items() if name.startswith("rewards/")}
    if len(parts) > 1:
        yield ", ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in parts.items())
    if sample["status"] != "ok":
        yield one_line(f"{sample['status']}: {sample['detail']}", 100)
    if sample.get("completion_ids"):
        yield f"{counted(len(sample['completion_ids']), 'token')}" + (
            ", cut off" if sample.get("finish") == "length" else ""
        )
    yield f"k {sample['k']}" if sample["source"] == "policy" else one_line(sample["source"])
