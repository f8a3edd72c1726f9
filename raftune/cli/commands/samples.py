"""`raftune samples` and `raftune alarms`: show a round's samples and a run's alarms, and save images."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from raftune.cli.flags import RunDirectory, switch
from raftune.cli.output import echo, json_line, out
from raftune.data.classifier_inputs import text_of
from raftune.errors import ConfigError
from raftune.records import EXTRA, Row, extras_of
from raftune.results import samples as run_samples
from raftune.results.samples import prompt_text
from raftune.results.summary import alarms_of
from raftune.sanitize import counted, harmless, one_line, shell_command
from raftune.store.files import explaining
from raftune.store.kinds import how_to_go_on
from raftune.store.run import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

Sort = Literal["best", "worst", "margin", "order"]
ORDERS = {"order": "in order", "best": "best first", "worst": "worst first", "margin": "largest margin first"}
GUTTER = 12
SIDE, GAP, LINE = 96, 8, 14  # of the contact sheet: pixels
INDEXED = ("sample_id", "prompt_id", "k", "source", "score", "held_out", "weight", "reason")  # in metadata.jsonl


def samples(
    run: RunDirectory,
    *,
    round_: Annotated[int | None, Parameter(name="--round", help="The round; default: the last one.")] = None,
    held_out: Annotated[bool, switch("Show the held-out samples.")] = False,
    prompt: Annotated[str | None, Parameter(help="Only prompts that contain this text, or have this id.")] = None,
    sort: Annotated[Sort, Parameter(help="Order of the prompts; margin: best minus mean.")] = "order",
    number: Annotated[int, Parameter(name=["--number", "-n"], help="Prompts to show.", validator=Number(gte=1))] = 3,
    full: Annotated[bool, switch("Whole completions, not their first line.")] = False,
    save: Annotated[
        str | None, Parameter(help="Save the shown images in this new folder, with metadata.jsonl.")
    ] = None,
    as_json: Annotated[bool, switch("Print JSON lines, one for each sample.", "--json")] = False,
) -> None:
    """Show a round's samples, with scores, verdicts (★: kept) and reasons.

    raftune samples runs/mine --round 3 --sort margin -n 5
    raftune samples runs/mine --prompt "birthday" --held-out
    raftune samples runs/images --sort best -n 20 --save best

    An image is named by the SHA-256 of its PNG file, of which the beginning is shown.
    """
    if save is not None:
        check_new_folder(Path(save))
    folder = RunFolder(run)
    folder.read_config()
    chosen, held_out = choose_round(folder, round_, held_out)
    chunks = run_samples.held_out_chunks(folder, chosen) if held_out else run_samples.training_chunks(folder, chosen)
    total, shown = first_prompts(
        (group for chunk in chunks for group in run_samples.by_prompt(chunk)), prompt, sort, number
    )
    if not total and prompt is not None:
        raise ConfigError(f"--prompt: no prompt of round {chosen} has {prompt!r} in its text or as its id.")
    saved = 0 if save is None else save_images([sample for group in shown for sample in group], Path(save), chosen)
    if as_json:
        for sample in (sample for group in shown for sample in group):
            logged = {f"{EXTRA}{name}": value for name, value in extras_of(sample).items()}
            facts = {"round": chosen, "held_out_prompt": held_out}
            completion = run_samples.readable(sample["completion"])
            print(json_line(sample | logged | {"completion": completion} | facts))
        return
    kind = "held-out prompts" if held_out else "prompts"
    echo(f"round {chosen}, {len(shown)} of {total} {kind}, {ORDERS[sort]}", style="dim")
    for group in shown:
        show_prompt(group, full)
    if save is not None:
        echo("", f"Wrote {counted(saved, 'image')} and metadata.jsonl to {save}.")
        echo(f"All at a glance: {contact_sheet_path(Path(save))}")


def choose_round(folder: RunFolder, round_: int | None, held_out: bool) -> tuple[int, bool]:
    """The round to show, and whether its held-out samples are: round 0 has no others."""
    evaluated = folder.rounds_with("evaluate/score")
    known = evaluated if held_out or round_ == 0 else folder.rounds_with("select")
    if not known and evaluated and round_ is None:
        return evaluated[-1], True
    if not known:
        raise ConfigError(f"{folder.root} has no such samples. {how_to_go_on(folder.root, folder.read_config())}")
    if round_ is not None and round_ not in known:
        raise ConfigError(f"--round must be one of {run_samples.span(known)}; got {round_}. Choose one of these.")
    return (known[-1] if round_ is None else round_), held_out or round_ == 0


def first_prompts(
    groups: Iterator[list[Row]], prompt: str | None, sort: Sort, number: int
) -> tuple[int, list[list[Row]]]:
    """How many prompts match, and the samples of the first `number` of them; only these are held in memory."""
    count = 0

    def matching() -> Iterator[tuple[float, int, list[Row]]]:
        nonlocal count
        for group in groups:
            text = prompt_text(group[0]["prompt"]).casefold()
            if prompt is None or group[0]["prompt_id"].startswith(prompt) or prompt.casefold() in text:
                count += 1
                yield sort_key(group, sort), count, group

    first = heapq.nsmallest(number, matching(), key=lambda item: item[:2])
    return count, [group for _, _, group in first]


def sort_key(group: list[Row], sort: Sort) -> float:
    scores = [sample["score"] for sample in run_samples.usable(group)]
    if sort == "best":
        return -max(scores, default=float("-inf"))
    if sort == "worst":
        return float(min(scores, default=float("-inf")))
    if sort == "margin":
        return float(sum(scores) / len(scores) - max(scores)) if scores else float("inf")
    return 0.0


def show_prompt(group: list[Row], full: bool) -> None:
    """The prompt and its samples, best first: ★ if kept, score and completion, and the remarks below."""
    console = out()
    prompt = one_line(prompt_text(group[0]["prompt"]))
    console.print()
    console.print(Text.assemble((prompt, "bold"), (f"  {group[0]['prompt_id']}", "dim")))
    width = None if full or not console.is_terminal else max(console.width - GUTTER, 20)
    for sample in sorted(group, key=lambda s: (s["score"] is None, -(s["score"] or 0.0), s["k"])):
        kept = (sample.get("weight") or 0) > 0
        score = "–" if sample["score"] is None else f"{sample['score']:.3f}"
        head = Text.assemble(("★ " if kept else "  ", "bold yellow"), (f"{score:>8}  ", "green" if kept else ""))
        text = completion_text(sample, width, full, GUTTER)
        console.print(head + Text(text, style="dim" if text == "(empty)" else ""))
        console.print(Text(" " * GUTTER + " · ".join(remarks(sample)), style="dim"))


def remarks(sample: Row) -> Iterator[str]:
    if sample.get("reason"):
        yield str(sample["reason"])
    if sample.get("held_out") is not None:
        yield f"held out {sample['held_out']:.3f}"
    parts = {name.removeprefix("rewards/"): value for name, value in sample.items() if name.startswith("rewards/")}
    if len(parts) > 1:
        yield ", ".join(f"{name} {'–' if value is None else f'{value:.3f}'}" for name, value in parts.items())
    if sample["status"] != "ok":
        yield one_line(f"{sample['status']}: {sample['detail']}", 100)
    if ids := sample.get("completion_ids"):
        yield f"{counted(len(ids), 'token')}{', cut off' if sample.get('finish') == 'length' else ''}"
    yield f"k {sample['k']}" if sample["source"] == "policy" else one_line(sample["source"])


# -- saving images -----------------------------------------------------------------------------------------------------


def contact_sheet_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-contact-sheet.png")


def check_new_folder(folder: Path) -> None:
    """Raises ConfigError if writing images there would touch other files."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--save must be a new or an empty folder; {folder} is not. Choose another.")
    if (sheet := contact_sheet_path(folder)).exists():
        raise ConfigError(f"--save writes {sheet} as well, which exists. Choose another folder.")


def save_images(rows: list[Row], folder: Path, round_: int) -> int:
    """Writes the samples' images, metadata.jsonl (an image folder of `datasets`), and a contact sheet beside it.

    Returns the number of images. Raises ConfigError if there is none.
    """
    images = [sample for sample in rows if isinstance(sample["completion"], bytes)]
    if not images:
        raise ConfigError("--save writes images, and these samples hold none. Leave it out.")
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(s["prompt_id"] for s in images), 1)}
        lines = []
        for sample in images:
            name = file_name(sample, numbers[sample["prompt_id"]])
            (folder / name).write_bytes(sample["completion"])
            facts = {key: sample[key] for key in INDEXED if key in sample}
            facts |= {key: value for key, value in sample.items() if key.startswith("rewards/")}
            line = {"file_name": name, "prompt": sample["prompt"], "round": round_, **facts}
            lines.append(json.dumps(line, ensure_ascii=False))
        contact_sheet(images).save(contact_sheet_path(folder))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(images)


def file_name(sample: Row, number: int) -> str:
    """`003-a-red-circle-k05-+1.250.png`: prompt's number and beginning, k, source if not the policy, and score.

    Only ASCII letters and digits of the prompt are used.
    """
    words = re.sub(r"[^a-z0-9]+", "-", text_of(sample["prompt"]).casefold())[:40].strip("-")
    source = re.sub(r"[^a-z0-9]+", "", str(sample.get("source", "policy")).casefold())[:20]
    score = "unscored" if sample.get("score") is None else f"{sample['score']:+.3f}"
    parts = (f"{number:03d}", words, f"k{sample['k']:02d}", "" if source == "policy" else source, score)
    return "-".join(filter(None, parts)) + ".png"


def contact_sheet(rows: list[Row]) -> Image:
    """All images small: a row for each prompt, and each image's k and score, with * if it was kept."""
    sheet: dict[str, tuple[str, list[tuple[str, bytes | None]]]] = {}
    for sample in rows:
        score = "-" if sample.get("score") is None else f"{sample['score']:.2f}"
        star = "* " if (sample.get("weight") or 0) > 0 else ""
        _, images = sheet.setdefault(sample["prompt_id"], (text_of(sample["prompt"]), []))
        images.append((f"{star}k {sample['k']}: {score}", sample["completion"]))
    return image_sheet(list(sheet.values()))


def image_sheet(rows: list[tuple[str, list[tuple[str, bytes | None]]]]) -> Image:
    """A row for each caption, which stands above its images; each image has its label below. None: a blank."""
    from PIL import Image, ImageDraw, ImageOps

    from raftune.data.images import image_of

    width = max(GAP + max(len(images) for _, images in rows) * (SIDE + GAP), 240)
    height = SIDE + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, GAP + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (caption, images) in enumerate(rows):
        top = GAP + y * height
        words = one_line(caption, width // 6)
        pen.text((GAP, top), words.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for x, (label, png) in enumerate(images):
            left = GAP + x * (SIDE + GAP)
            pen.text((left, top + LINE + SIDE), label, fill="black")
            if png is not None:
                image = image_of(png)
                filter_ = Image.Resampling.NEAREST if image.width < SIDE else Image.Resampling.LANCZOS
                sheet.paste(ImageOps.contain(image, (SIDE, SIDE), filter_), (left, top + LINE))
    return sheet


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
        raise ConfigError(f"--round must be one of {run_samples.span(rounds)}; got {round_}. Choose one of these.")
    rounds = rounds if round_ is None else [round_]
    raised = [(r, alarm) for r in rounds for alarm in alarms_of(folder, r)]
    if as_json:
        for _, alarm in raised:
            print(json_line(alarm))
        return
    where = f"round {rounds[0]}" if len(rounds) == 1 else f"rounds {run_samples.span(rounds)}"
    echo(f"{counted(len(raised), 'alarm')} in {where}", style="dim")
    for r, alarm in raised:
        show_alarm(folder, r, alarm, number, full)


def completion_text(sample: Row, width: int | None, full: bool, indent: int) -> str:
    """The completion's first line, at most `width` columns, or all lines, indented."""
    text = run_samples.answer_text(sample["completion"])
    return (harmless(text).replace("\n", "\n" + " " * indent) if full else one_line(text, width)) or "(empty)"


def show_alarm(folder: RunFolder, round_: int, alarm: Row, number: int, full: bool) -> None:
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
