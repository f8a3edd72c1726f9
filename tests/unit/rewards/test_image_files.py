"""Images of a person's own files, as `raftune reward score` and `check` read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raftune.cli import main
from raftune.data.images import png_of
from raftune.errors import DataError
from raftune.rewards.files import read_answers

GREYS = (10, 100, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different sizes, the darkest first, and one file that is none."""
    for i, grey in enumerate(GREYS):
        Image.new("RGB", (16 + i, 20), (grey,) * 3).save(tmp_path / f"{i}.png")
    (tmp_path / "9.png").write_bytes(b"no image")
    return tmp_path


def greys(source: Path) -> list[int]:
    return [int(np.asarray(picture).mean()) for picture in read_answers(str(source)).completions]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_with_metadata_gives_images_prompts_and_columns(folder: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"grey {i}", "shade": i} for i in (2, 0)]
    lines(folder / "metadata.jsonl", [*rows, {"file_name": "9.png", "text": "x"}, {"text": "no name"}])
    found = read_answers(str(folder))
    assert greys(folder) == [200, 10]
    assert (found.prompts, found.columns, found.rows) == (["grey 2", "grey 0"], {"shade": [2, 0]}, [1, 2])
    assert [(one.row, one.reason) for one in found.skipped] == [(3, "broken line"), (4, "missing column")]
    assert found.words[0] == f"{folder}: 2 images"


def test_a_folder_with_text_files_takes_those_as_prompts(folder: Path) -> None:
    for i in (0, 1):
        (folder / f"{i}.txt").write_text(f"grey {i}\n")
    found = read_answers(str(folder))
    assert (found.prompts, greys(folder)) == (["grey 0", "grey 1"], [10, 100])
    assert len(found.skipped) == 2


def test_a_folder_without_prompts_says_how_to_give_them(folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds images and no prompts\. Add metadata\.jsonl"):
        read_answers(str(folder))


def test_paths_in_a_file_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    path = lines(folder / "rows.jsonl", [{"prompt": "a", "image": "1.png"}, {"prompt": "b", "image": "gone.png"}])
    found = read_answers(str(path))
    assert (greys(path), found.written) == ([100], ["1.png"])
    assert "gone.png" in found.skipped[0].detail


def test_parquet_holds_bytes_or_what_datasets_makes_of_images(folder: Path) -> None:
    png = png_of(Image.open(folder / "1.png"))
    for name, values in {"completion": [png], "image": [{"bytes": png, "path": None}]}.items():
        pq.write_table(pa.table({"prompt": ["a"], name: values}), folder / "rows.parquet")
        assert greys(folder / "rows.parquet") == [100]
    assert str(read_answers(str(folder / "rows.parquet")).written[0]).endswith(".png")


def test_rows_without_any_image_are_refused_with_the_reason(folder: Path) -> None:
    path = lines(folder / "rows.jsonl", [{"prompt": "a", "image": "9.png"}])
    with pytest.raises(DataError, match=r"must hold images .*; all rows were skipped: 1 broken line: row 1"):
        read_answers(str(path))


def test_score_writes_a_row_an_image_with_its_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(folder / "rows.jsonl", [{"prompt": "a", "image": f"{i}.png", "shade": i} for i in range(3)])
    out = folder / "out.jsonl"
    assert main(["reward", "score", "colour", str(path), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statuses"] == {"ok": 3}
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completion"] for row in written] == ["0.png", "1.png", "2.png"]
    assert [row["score"] for row in written] == pytest.approx([grey / 255 for grey in GREYS])
    assert [row["shade"] for row in written] == [0, 1, 2]


@pytest.mark.slow
def test_check_tries_a_persons_own_images_or_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines(folder / "metadata.jsonl", [{"file_name": f"{i}.png", "prompt": "a"} for i in range(3)])
    for samples, count, mixed in ((["--samples", str(folder)], 3, None), ([], 16, True)):
        assert main(["reward", "check", "colour", "--json", *samples]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["samples"], told["mixed_sizes"], told["batch_independent"]) == (count, mixed, True)
    (folder / "own.py").write_text(
        "import numpy as np\n"
        "def stacks(completions, **kwargs):\n"
        "    values = np.stack([np.asarray(c, float) for c in completions]).mean((1, 2, 3))\n"
        "    return list(values)\n"
        "def centres(completions, **kwargs):\n"
        "    values = np.array([np.asarray(c, float).mean() for c in completions])\n"
        "    return list(values - values.mean())\n"
    )
    assert main(["reward", "check", f"{folder}/own.py:stacks", "--images"]) == 0
    assert "fails where images of several sizes are in one call" in capsys.readouterr().out.replace("\n", " ")
    assert main(["reward", "check", f"{folder}/own.py:centres", "--images", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["batch_independent"] is False


def test_the_word_starter_means_the_reward_of_images_where_the_file_holds_some(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(folder / "metadata.jsonl", [{"file_name": f"{i}.png", "prompt": "a red circle"} for i in range(3)])
    assert main(["reward", "score", "starter", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["statuses"] == {"ok": 3}
    assert main(["reward", "check", "starter", "--samples", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "clip_score"


def test_a_reward_of_the_other_medium_is_refused_before_it_is_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = lines(folder / "rows.jsonl", [{"prompt": "a", "image": "1.png"}])
    texts = lines(folder / "texts.jsonl", [{"prompt": "a", "completion": "b"}])
    assert main(["reward", "score", "length", str(pictures), "--options", '{"target": 20}']) == 2
    assert "length scores texts, and was given images. Name a reward for images" in capsys.readouterr().err
    assert main(["reward", "score", "colour", str(texts)]) == 2
    assert "colour scores images, and was given texts. Name a reward for texts" in capsys.readouterr().err
    assert main(["reward", "check", "length", "--images", "--options", '{"target": 20}']) == 2
    assert main(["reward", "check", "colour", "--samples", str(texts)]) == 2


def test_mixed_sizes_are_not_blamed_where_any_call_fails(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "own.py").write_text("def breaks(completions, **kwargs):\n    raise ValueError('no')\n")
    assert main(["reward", "check", f"{folder}/own.py:breaks", "--images", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["mixed_sizes"] is None
