"""Images in a data set's columns, however they lie there, become bytes that a run keeps and a policy learns from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.data.images import image_of, png_of
from raftune.data.tables import read_rows, table_from
from raftune.errors import DataError
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.sft import sft
from tests.runs.image_family import config, saturation

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30))


def numbered_image(number: int) -> Image.Image:
    image = Image.new("RGB", (16, 16), COLOURS[number % 4])
    image.putpixel((3, 3), (255, 255, 255))
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set with images beside it."""
    (tmp_path / "pics").mkdir()
    lines = []
    for number in range(4):
        (tmp_path / f"pics/{number}.png").write_bytes(png_of(numbered_image(number)))
        lines.append(json.dumps({"prompt": f"disc {number}", "image": f"pics/{number}.png", "note": f"{number}.png"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_paths_are_relative_to_the_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    rows = read_rows(str(folder / "rows.jsonl"))
    assert rows.column("image").type == pa.binary()
    assert [image_of(png).getpixel((0, 0)) for png in rows.column("image").to_pylist()] == list(COLOURS)


def test_texts_that_only_look_like_paths_stay_texts(folder: Path) -> None:
    assert read_rows(str(folder / "rows.jsonl")).column("note").to_pylist() == ["0.png", "1.png", "2.png", "3.png"]


def test_a_file_that_is_not_there_is_named_with_its_row(folder: Path) -> None:
    (folder / "pics/2.png").unlink()
    with pytest.raises(DataError, match=r"the image in row 3 of the column 'image' cannot be read: No such file"):
        read_rows(str(folder / "rows.jsonl"))


def test_what_datasets_wrote_is_read(folder: Path) -> None:
    made = datasets.Dataset.from_dict({"prompt": ["a", "b"], "image": [numbered_image(0), numbered_image(1)]})
    made = made.cast_column("image", datasets.Image())
    made.save_to_disk(str(folder / "saved"))
    made.to_parquet(str(folder / "saved.parquet"))
    for rows in (read_rows(str(folder / "saved")), read_rows(str(folder / "saved.parquet")), table_from(made)):
        assert rows.column("image").type == pa.binary()
        assert [image_of(png).getpixel((0, 0)) for png in rows.column("image").to_pylist()] == list(COLOURS[:2])


def test_pillow_s_images_in_a_list_of_rows_are_taken() -> None:
    rows = table_from([{"prompt": "a", "image": numbered_image(0)}, {"prompt": "b", "image": None}])
    assert image_of(rows.column("image")[0].as_py()).size == (16, 16)
    assert rows.column("image")[1].as_py() is None


def test_a_run_keeps_its_reference_images_and_hands_them_to_rewards(folder: Path) -> None:
    seen: list[Any] = []

    def near(prompts: list[str], completions: list[Any], image: list[bytes], **columns: Any) -> list[float]:
        seen.extend(image)
        return saturation(prompts, completions)

    settings = config(
        folder / "run",
        num_rounds=1,
        data={"prompts": str(folder / "rows.jsonl")},
        evaluation={"num_prompts": 0},
        sampling={"num_generations": 2, "chunk_size": 4, "candidate_columns": ["image"]},
    )
    run(settings, PythonObjects(rewards=[near]))
    kept = pq.read_table(folder / "run/round-0000/data/train.parquet").column("image").to_pylist()
    assert kept == [png_of(numbered_image(number)) for number in range(4)]
    assert set(seen) == set(kept) and len(seen) == 12
    generated = pq.read_table(folder / "run/round-0001/generate/chunk-00000.parquet").to_pylist()
    assert {row["completion"] for row in generated if row["source"] == "column:image"} == set(kept)


@pytest.mark.parametrize("column", ["image", "completion"])
def test_a_policy_is_taught_prompts_with_images(folder: Path, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    lines = [{"prompt": f"disc {n}", column: f"pics/{n}.png"} for n in range(4)] * 3
    (folder / "taught.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    given = {
        "output_dir": str(folder / "out"),
        "threads": 1,
        "data": {"path": str(folder / "taught.jsonl"), "held_out_fraction": 0.3},
        "policy": {"family": "tests.runs.image_family:SketchFamily", "options": {"size": 16}},
    }
    learned = sft(validate_as(SftConfig, given))
    assert learned.report["data"]["learned"] == 9 and learned.report["data"]["held_out"] == 3
    assert learned.report["data"]["format"].startswith("prompts and images")
    rows = pq.read_table(folder / "out/rows.parquet")
    assert {*rows.column("completion").to_pylist()} <= {png_of(numbered_image(number)) for number in range(4)}
    held_out = [json.loads(line) for line in (folder / "out/held_out.jsonl").read_text().splitlines()]
    assert held_out[0]["reference"] is None
    law = json.loads((folder / "out/model/policy.json").read_text())
    assert max(map(abs, law["mean"])) > 0.5


def test_an_image_that_is_not_there_is_a_row_that_is_skipped(folder: Path) -> None:
    lines = [{"prompt": "a", "image": "pics/0.png"}, {"prompt": "b", "image": "pics/none.png"}]
    (folder / "taught.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    given = {
        "output_dir": str(folder / "out"),
        "threads": 1,
        "data": {"path": str(folder / "taught.jsonl")},
        "policy": {"family": "tests.runs.image_family:SketchFamily", "options": {"size": 16}},
    }
    assert sft(validate_as(SftConfig, given)).report["data"]["skipped"] == {"missing column": 1}
