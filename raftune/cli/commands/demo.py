"""`raftune demo`: aligns a bundled model; `demo hacking` shows what a flawed reward does."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from raftune.cli.commands.samples import image_sheet, show_alarm
from raftune.cli.flags import Json, switch
from raftune.cli.output import PlainTable, echo, out
from raftune.cli.run_command import all_alarms, outcome_json, outcome_words, run_with_progress
from raftune.config.load import merge, read_yaml, validate
from raftune.config.run import RunConfig, held_out_names
from raftune.results.summary import cell, columns_for, rows_of
from raftune.runtime.run import root_of
from raftune.sanitize import one_line, shell_command
from raftune.store.run import RunFolder

Demo = Literal["text", "hacking", "image"]
RECIPES: dict[Demo, str] = {"text": "text/demo.yaml", "hacking": "text/hacking.yaml", "image": "image/image.yaml"}
CANDIDATES = 8  # completions per shown prompt, of which the median is shown
GRID_ROWS = 12  # captions in the grid of images


def demo(
    kind: Annotated[
        Demo, Parameter(name="WHICH", help="text; hacking: a flawed reward, and the alarm; image: with images.")
    ] = "text",
    *,
    output_dir: Annotated[
        str | None, Parameter(show_default=False, help="The run's directory; default: runs/demo, hacking or image.")
    ] = None,
    fresh: Annotated[bool, switch("Start a new run beside an earlier one.")] = False,
    num_rounds: Annotated[
        int | None,
        Parameter(show_default=False, help="Rounds; default: the demo's own number.", validator=Number(gte=1)),
    ] = None,
    as_json: Json = False,
) -> None:
    """Align the bundled model and show the result: under a minute on two CPU cores, no network.

    raftune demo
    raftune demo hacking
    raftune demo image

    A tiny assistant, rude and unhelpful half of the time, is trained with a small reward model; a judge that is never
    trained on evaluates it. With `hacking` the reward counts courteous phrases, and the policy exploits it. With
    `image` a tiny diffusion pipeline that was trained on wrong captions learns to follow captions, in two to three
    minutes. Each demo is a normal run: every command works on it.
    """
    directory = output_dir or f"runs/{Path(RECIPES[kind]).stem}"
    config = recipe(unused(directory) if fresh else directory, kind)
    if num_rounds is not None:
        config = config.model_copy(update={"num_rounds": num_rounds})
    outcome, worked = run_with_progress(config)
    root = root_of(config)
    rows, alarms = rows_of(root), all_alarms(root, outcome)
    facts: dict[str, Any] = {"by_round": rows}
    labels = {"before": 0, "after": outcome.best}
    best: dict[str, Any] = {}
    if kind == "image":
        facts["grid"] = str(write_grid(root))
    else:
        if kind == "hacking":
            best = max(rows, key=lambda row: row["held_out"])
            middle = {f"round {best['round']}": best["round"]} if best["round"] else {}
            labels = {"before": 0, **middle, "after": outcome.rounds}
            facts |= {"raised": alarms, "best_by_judge": best["round"]}
        facts["shown"] = typical_completions(root, config, labels)
    if as_json:
        print(json.dumps(outcome_json(root, outcome, worked) | facts))
        return
    if kind == "hacking":
        echo("", "The reward counts courteous phrases. The judge knows what a good reply is, and is never trained on.")
    elif kind == "image":
        words = "The judge says how much of its caption an image shows, and is never trained on."
        echo("", f"The reward is a CLIP score. {words}")
    columns = columns_for(rows, held_out_names(config))
    table = PlainTable(*(column.title for column in columns), right=range(len(columns)))
    for row in rows:
        table.add(*(cell(column, row) for column in columns))
    echo("")
    table.show()
    echo("", *(f"  {column.title}: {column.meaning}" for column in columns[1:]), style="dim")
    if kind != "image":
        show_typical(facts["shown"], [*labels])
    falls = [alarm for alarm in alarms if alarm["alarm"] == "held_out_falls"]
    if kind == "hacking" and falls:
        show_alarm(RunFolder(root), falls[-1]["round"], falls[-1], 2, full=False)
    elif kind == "hacking":
        echo("", "No alarm was raised: the judge did not fall clearly enough.")
    echo("", *outcome_words(root, outcome, worked))
    if kind == "image":
        echo(f"  images  {facts['grid']}: {GRID_ROWS} captions, the same seeds in every round")
    if kind != "hacking":
        echo(f"  again     raftune demo{' image' if kind == 'image' else ''} --fresh")
        return
    resume = shell_command("raftune", "resume", root)
    echo(
        "",
        "The run goes by the flawed reward, and publishes its best. What would have helped, and still does at once:",
        f"  choose    {resume} --evaluation.best_by judge        publishes round {best['round']}",
    )
    if falls:
        echo(f"  stop      {resume} --guards.stop_on held_out_falls   ends after round {falls[0]['round']}")


def recipe(output_dir: str, kind: Demo = "text") -> RunConfig:
    with resources.as_file(resources.files("raftune.starters") / RECIPES[kind]) as path:
        return validate(merge([read_yaml(path), {"output_dir": output_dir}]))


def unused(output_dir: str) -> str:
    """The directory, or the first of DIR-2, DIR-3, … that does not exist."""
    path, number = Path(output_dir), 1
    while path.exists():
        number += 1
        path = Path(f"{output_dir}-{number}")
    return str(path)


# -- text --------------------------------------------------------------------------------------------------------------


def typical_completions(root: Path, config: RunConfig, rounds: dict[str, int]) -> list[dict[str, Any]]:
    """For each of three held-out prompts: a typical completion of each of these rounds, by label, and its score.

    Typical: of eight, generated with the same seeds in every round, the one whose held-out score is the median.
    """
    from raftune.protocols import Chunk
    from raftune.records import Prompt, derive_seed, prompt_ids
    from raftune.runtime.assembly import Runtime
    from raftune.starters.text import SHOW, judge

    folder = RunFolder(root)
    prompts = tuple(Prompt(name, text) for name, text in zip(prompt_ids(SHOW), SHOW, strict=True))
    seeds = tuple(tuple(derive_seed("show", prompt.id, k) for k in range(CANDIDATES)) for prompt in prompts)
    chunk = Chunk(0, "show", "show", prompts, seeds, CANDIDATES * len(prompts))
    shown: list[dict[str, Any]] = [{"prompt": str(prompt)} for prompt in SHOW]
    runtime = Runtime(folder, config)
    try:
        for label, round_ in rounds.items():
            samples = runtime.policies.at(folder.folder(round_, "model")).generate(chunk)
            for example, prompt in zip(shown, prompts, strict=True):
                completions = [sample.completion for sample in samples if sample.prompt_id == prompt.id]
                scores = [score or 0.0 for score in judge([prompt.content] * len(completions), completions)]
                score, completion = sorted(zip(scores, completions, strict=True))[len(completions) // 2]
                example |= {label: completion, f"{label}_score": score}
    finally:
        runtime.close()
    return shown


def show_typical(shown: list[dict[str, Any]], labels: list[str]) -> None:
    console = out()
    echo("", f"Completions of three requests outside the training set: of {CANDIDATES}, the median by the judge.")
    for example in shown:
        console.print()
        console.print(Text(one_line(example["prompt"].removeprefix("User: ").removesuffix("Assistant:")), style="bold"))
        for label, style in zip(labels, ("yellow", "green", "red"), strict=False):
            text, score = one_line(example[label]), f"  (judge {example[f'{label}_score']:.1f})"
            console.print(Text.assemble((f"  {label:<9}", style), text, (score, "dim")))


# -- images ------------------------------------------------------------------------------------------------------------


def write_grid(root: Path) -> Path:
    """Writes the run's grid.png: a row for each of the first held-out captions, a column for each round."""
    from raftune.store.parquet import read_table

    run = RunFolder(root)
    table = read_table(run.folder(0, "evaluate") / "plan" / "prompts.parquet").slice(0, GRID_ROWS)
    captions = dict(zip(table["prompt_id"].to_pylist(), map(str, table["prompt"].to_pylist()), strict=True))
    images = {round_: first_images(run, round_) for round_ in run.rounds_with("evaluate")}
    rows = [
        (caption, [(f"round {r}" if r else "start", by_prompt.get(prompt_id)) for r, by_prompt in images.items()])
        for prompt_id, caption in captions.items()
    ]
    image_sheet(rows).save(root / "grid.png", optimize=True)
    return root / "grid.png"


def first_images(run: RunFolder, round_: int) -> dict[str, bytes]:
    """The first image that the round generated for each held-out prompt, as PNG; none for an unusable sample."""
    from raftune.store.layout import chunk_file, chunk_numbers
    from raftune.store.parquet import read_table

    images: dict[str, bytes] = {}
    folder = run.folder(round_, "evaluate") / "generate"
    for chunk in chunk_numbers(folder):
        table = read_table(folder / chunk_file(chunk), ["prompt_id", "k", "completion"])
        for prompt_id, k, png in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if k == 0 and png is not None:
                images[prompt_id] = png
    return images
