"""Prints an alarm with its samples and their prompts."""

from __future__ import annotations

from rich.text import Text

from raftune.cli.output import out
from raftune.records import Row
from raftune.results import samples as ledger
from raftune.results.samples import prompt_text
from raftune.sanitize import harmless, one_line
from raftune.store.run import RunFolder


def show(folder: RunFolder, round_: int, alarm: Row, number: int, full: bool) -> None:
    """The alarm: what it says, and the first of its samples with their prompts."""
    console = out()
    console.print()
    console.print(Text.assemble((f"round {round_}  ", "bold"), (one_line(alarm["title"]), "bold yellow")))
    console.print(Text(f"  {one_line(alarm['evidence'])}"))
    named = alarm["samples"][:number]
    samples = ledger.find_samples(folder, round_, [item["sample_id"] for item in named])
    width = None if full or not console.is_terminal else max(console.width - 4, 20)
    for item in named:
        console.print(Text(f"  {one_line(item['why'])}  {one_line(item['sample_id'])}", style="dim"))
        if sample := samples.get(item["sample_id"]):
            for line in lines_of(sample, width, full):
                console.print(line)
    if len(alarm["samples"]) > number:
        console.print(Text(f"  and {len(alarm['samples']) - number} more", style="dim"))


def lines_of(sample: Row, width: int | None, full: bool) -> list[Text]:
    """The prompt and the completion."""
    prompt, answer = prompt_text(sample["prompt"]), ledger.answer_text(sample["completion"])
    shown = harmless(answer).replace("\n", "\n    ") if full else one_line(answer, width)
    return [Text(f"    {one_line(prompt, width)}", style="bold"), Text(f"    {shown or '(empty)'}")]
