"""Prints samples and alarms on the terminal."""

from __future__ import annotations

from rich.text import Text

from raftune.cli.output import out
from raftune.records import Row
from raftune.results import samples as run_samples
from raftune.sanitize import harmless, one_line
from raftune.store.run import RunFolder


def completion_text(sample: Row, width: int | None, full: bool, indent: int) -> str:
    """The completion's first line, at most `width` columns, or all lines, indented."""
    text = run_samples.answer_text(sample["completion"])
    return (harmless(text).replace("\n", "\n" + " " * indent) if full else one_line(text, width)) or "(empty)"


def show_alarm(folder: RunFolder, round_: int, alarm: Row, number: int, full: bool) -> None:
    """Prints the alarm, and the first `number` of its samples with their prompts."""
    console = out()
    console.print()
    console.print(Text.assemble((f"round {round_}  ", "bold"), (one_line(alarm["title"]), "bold yellow")))
    console.print(Text(f"  {one_line(alarm['evidence'])}"))
    shown = alarm["samples"][:number]
    samples = run_samples.find_samples(folder, round_, [item["sample_id"] for item in shown])
    width = None if full or not console.is_terminal else max(console.width - 4, 20)
    for item in shown:
        console.print(Text(f"  {one_line(item['why'])}  {one_line(item['sample_id'])}", style="dim"))
        if sample := samples.get(item["sample_id"]):
            prompt = one_line(run_samples.prompt_text(sample["prompt"]), width)
            console.print(Text(f"    {prompt}", style="bold"))
            console.print(Text(f"    {completion_text(sample, width, full, 4)}"))
    if len(alarm["samples"]) > number:
        console.print(Text(f"  and {len(alarm['samples']) - number} more", style="dim"))
