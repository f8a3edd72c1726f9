"""Final output of `raftune demo image`: the table by round, and a grid of images with the same captions and seeds."""

from __future__ import annotations

import json as js
from pathlib import Path
from typing import TYPE_CHECKING

from raftune.cli.demo_text import by_round
from raftune.cli.output import echo
from raftune.cli.run_command import outcome_json, outcome_words
from raftune.config.run import RunConfig, held_out_names
from raftune.loop import RunOutcome
from raftune.results.summary import rows_of
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import read_table
from raftune.store.run import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "grid.png"
ROWS = 12  # captions
SIDE, GAP, HEAD = 72, 6, 20  # of an image as it is shown, between two, above them: pixels


def tell(root: Path, config: RunConfig, outcome: RunOutcome, worked: bool, *, as_json: bool) -> None:
    """Prints the table by round and where the images are; writes grid.png into the run."""
    path = write_grid(root)
    if as_json:
        print(js.dumps(outcome_json(root, outcome, worked) | {"by_round": rows_of(root), "grid": str(path)}))
        return
    echo("")
    echo("The reward is a CLIP score. The judge says how much of its caption an image shows, and is never trained on.")
    by_round(root, held_out_names(config))
    echo("")
    for line in outcome_words(root, outcome, worked):
        echo(line)
    echo(f"  images  {path}: {ROWS} captions, the same seeds in every round")
    echo("  again     raftune demo image --fresh")


def write_grid(root: Path) -> Path:
    """The run's grid.png: of the first held-out captions a row each, of the start and every round a column."""
    run = RunFolder(root)
    rounds = run.rounds_with("evaluate")
    grid(captions(run), {round_: drawn(run, round_) for round_ in rounds}).save(root / NAME, optimize=True)
    return root / NAME


def captions(run: RunFolder) -> dict[str, str]:
    """The first held-out prompts by their ids, in the order of the data."""
    table = read_table(run.folder(0, "evaluate") / "plan" / "prompts.parquet")
    ids, prompts = table["prompt_id"].to_pylist(), table["prompt"].to_pylist()
    return dict(zip(ids[:ROWS], map(str, prompts[:ROWS]), strict=True))


def drawn(run: RunFolder, round_: int) -> dict[str, bytes]:
    """The first image of each held-out prompt that a round generated, as PNG; none for a sample that is no image."""
    found: dict[str, bytes] = {}
    folder = run.folder(round_, "evaluate") / "generate"
    for chunk in chunk_numbers(folder):
        table = read_table(folder / chunk_file(chunk), ["prompt_id", "k", "completion"])
        for prompt_id, k, png in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if k == 0 and png is not None:
                found[prompt_id] = png
    return found


def grid(named: dict[str, str], by_round_: dict[int, dict[str, bytes]]) -> Image:
    """A sheet of images: prompts in rows, with their captions, rounds in columns."""
    from PIL import Image, ImageDraw

    from raftune.data.images import image_of

    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * GAP + max((int(measure.textlength(caption)) for caption in named.values()), default=0)
    sheet = Image.new("RGB", (left + len(by_round_) * (SIDE + GAP) + GAP, HEAD + len(named) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (prompt_id, caption) in enumerate(named.items()):
        top = HEAD + y * (SIDE + GAP)
        pen.text((GAP, top + SIDE // 2), caption, fill="black", anchor="lm")
        for x, (round_, pictures) in enumerate(by_round_.items()):
            place = left + GAP + x * (SIDE + GAP)
            pen.text((place + SIDE // 2, HEAD // 2), str(round_ or "start"), fill="black", anchor="mm")
            if (png := pictures.get(prompt_id)) is not None:
                sheet.paste(image_of(png).resize((SIDE, SIDE), Image.Resampling.NEAREST), (place, top))
    return sheet
