"""Reference images of all kinds are mixed in; one that cannot be is named by its row, before a round is spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raftune.data.images import image_of
from raftune.errors import DataError
from raftune.runtime.run import run
from tests.runs.image_family import config, objects

SIDE = 16
NONE: dict[str, Any] = {"evaluation": {"num_prompts": 0}, "num_rounds": 1}


def noise(channels: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, channels), dtype=np.uint8))


def references(folder: Path, pictures: dict[str, Image.Image | bytes]) -> dict[str, Any]:
    """A data set of these images in their files, and the section that mixes in all of it."""
    rows = []
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name)
        rows.append(json.dumps({"prompt": f"a {name}", "image": name}) + "\n")
    (folder / "real.jsonl").write_text("".join(rows))
    return {"reference": {"path": str(folder / "real.jsonl"), "completion_column": "image", "fraction": 0.9}}


def test_images_in_every_mode_become_rgb(tmp_path: Path) -> None:
    modes = {f"{mode}.png": noise().convert(mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")}
    training = references(tmp_path, {**modes, "cmyk.jpg": noise().convert("CMYK")})
    run(config(tmp_path / "run", training=training, **NONE), objects())
    rows = pq.read_table(tmp_path / "run/round-0001/rows/rows.parquet").to_pylist()
    mixed = [image_of(row["completion"]) for row in rows if row["origin"] == "reference"]
    assert len(mixed) == 7 and {(image.mode, image.size) for image in mixed} == {("RGB", (SIDE, SIDE))}


def test_an_image_that_is_nothing_to_learn_from_is_named_by_its_row(tmp_path: Path) -> None:
    training = references(tmp_path, {"a.png": noise(), "flat.png": Image.new("RGB", (SIDE, SIDE), "red")})
    with pytest.raises(DataError, match=r"training\.reference\.path, row 2: there is nothing to learn from \(flat"):
        run(config(tmp_path / "run", training=training, **NONE), objects())


def test_a_file_that_is_no_image_is_named_by_its_row(tmp_path: Path) -> None:
    training = references(tmp_path, {"a.png": noise(), "b.png": b"no image"})
    with pytest.raises(DataError, match=r"path, row 2: .*these 8 bytes are no image\. An image is a PNG or JPEG"):
        run(config(tmp_path / "run", training=training, **NONE), objects())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"training\.reference\.path must name a file that exists; got 'nowhere\.jsonl'"),
        (
            {"completion_column": "photo"},
            r"must have the column 'photo' \(training\.reference\.completion_column\); got",
        ),
        ({"prompt_column": "caption"}, r"must have the column 'caption' \(training\.reference\.prompt_column\); got"),
    ],
)
def test_references_that_cannot_be_read_are_refused_before_generation(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    training = references(tmp_path, {"a.png": noise()})
    with pytest.raises(DataError, match=message):
        run(config(tmp_path / "run", training={"reference": training["reference"] | changes}, **NONE), objects())
    assert not list((tmp_path / "run").rglob("chunk-*.parquet"))


@pytest.mark.parametrize(("gone", "row"), [("a.png", 1), ("b.png", 2)])
def test_an_image_s_file_that_is_gone_is_named_by_its_row_before_generation(
    tmp_path: Path, gone: str, row: int
) -> None:
    training = references(tmp_path, {"a.png": noise(), "b.png": noise()})
    (tmp_path / gone).unlink()
    with pytest.raises(DataError, match=rf"the image in row {row} of the column 'image' cannot be read: No such file"):
        run(config(tmp_path / "run", training=training, **NONE), objects())
    assert not list((tmp_path / "run").rglob("chunk-*.parquet"))
