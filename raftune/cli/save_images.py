"""Saves images of samples as files, with an index that `datasets` reads as an image folder."""

from __future__ import annotations

import json as js
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raftune.data.classifier_inputs import text_of
from raftune.errors import ConfigError
from raftune.records import Row
from raftune.store.files import explaining

if TYPE_CHECKING:
    from PIL.Image import Image

INDEX = "metadata.jsonl"
SIDE, GAP, LINE = 96, 8, 14  # of the contact sheet: pixels
TOLD = ("sample_id", "prompt_id", "k", "source", "score", "held_out", "weight", "reason")


def check_folder(folder: Path) -> None:
    """Raises ConfigError unless images can be written there without touching what somebody else wrote."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--save must be a new or an empty folder; {folder} is not. Choose another.")
    if sheet_of(folder).exists():
        raise ConfigError(f"--save writes {sheet_of(folder)} as well, which exists. Choose another folder.")


def save_pictures(samples: Iterable[Row], folder: Path, round_: int) -> int:
    """Writes each sample's image, metadata.jsonl with a line a sample, and a contact sheet beside the folder.

    A file is named by the prompt (its number here and the letters and digits it begins with), k and the score. Returns
    the number of images. Raises ConfigError where no sample holds one.
    """
    shown = [sample for sample in samples if isinstance(sample["completion"], bytes)]
    if not shown:
        raise ConfigError("--save writes images, and these samples hold none. Leave it out.")
    with explaining(folder):
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {prompt_id: i for i, prompt_id in enumerate(dict.fromkeys(s["prompt_id"] for s in shown), 1)}
        names = [name_of(sample, numbers[sample["prompt_id"]]) for sample in shown]
        for name, sample in zip(names, shown, strict=True):
            (folder / name).write_bytes(sample["completion"])
        lines = [
            js.dumps({"file_name": name, **described(sample, round_)}, ensure_ascii=False)
            for name, sample in zip(names, shown, strict=True)
        ]
        contact_sheet(shown).save(sheet_of(folder))
        (folder / INDEX).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(shown)


def name_of(sample: Row, number: int) -> str:
    """`003-a-red-circle-k05-+1.250.png`: sorts by prompt and k; nothing of a prompt but ASCII letters and digits."""
    words = re.sub(r"[^a-z0-9]+", "-", text_of(sample["prompt"]).casefold())[:40].strip("-")
    score = "unscored" if sample.get("score") is None else f"{sample['score']:+.3f}"
    return "-".join(filter(None, (f"{number:03d}", words, f"k{sample['k']:02d}", source_of(sample), score))) + ".png"


def source_of(sample: Row) -> str:
    """What tells a teacher's or a person's image from the policy's own of the same k."""
    source = re.sub(r"[^a-z0-9]+", "", str(sample.get("source", "policy")).casefold())
    return "" if source in ("policy", "") else source[:20]


def sheet_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-contact-sheet.png")


def contact_sheet(samples: Sequence[Row]) -> Image:
    """All images small: a row for each prompt, its text above, each image's k and score below it."""
    from PIL import Image, ImageDraw

    from raftune.data.images import image_of
    from raftune.sanitize import one_line

    rows: dict[str, list[Row]] = {}
    for sample in samples:
        rows.setdefault(sample["prompt_id"], []).append(sample)
    width = GAP + max(map(len, rows.values())) * (SIDE + GAP)
    height = SIDE + 2 * LINE + GAP
    sheet = Image.new("RGB", (max(width, 240), GAP + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, group in enumerate(rows.values()):
        top = GAP + y * height
        words = one_line(text_of(group[0]["prompt"]), max(width, 240) // 6)
        pen.text((GAP, top), words.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for x, sample in enumerate(group):
            left, picture = GAP + x * (SIDE + GAP), image_of(sample["completion"])
            picture.thumbnail(
                (SIDE, SIDE), Image.Resampling.NEAREST if picture.width < SIDE else Image.Resampling.LANCZOS
            )
            sheet.paste(picture, (left, top + LINE))
            score = "–" if sample.get("score") is None else f"{sample['score']:.2f}"
            star = "* " if (sample.get("weight") or 0) > 0 else ""
            pen.text((left, top + LINE + SIDE), f"{star}k {sample['k']}: {score}".replace("–", "-"), fill="black")
    return sheet


def described(sample: Row, round_: int) -> dict[str, Any]:
    """The image's line in the index: what was asked, and what came of it."""
    known = {name: sample[name] for name in TOLD if name in sample}
    rewards = {name: value for name, value in sample.items() if name.startswith("rewards/")}
    return {
        "prompt": sample["prompt"],
        "round": round_,
        **known,
        **rewards,
    }
