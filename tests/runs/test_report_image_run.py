"""The page of a real run of images: all of them where they belong, and of use when some are damaged."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raftune.report import collect, write_report
from raftune.report import images as report_images
from raftune.report.overview import overview
from raftune.runtime.run import run
from raftune.store.commit import MARKER, with_hash
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import json_bytes, sha256_of
from raftune.store.parquet import read_metadata, read_table, write_table
from tests.runs import image_family

SHARD = "round-0001/generate/chunk-00000.parquet"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of images of 8 pixels, some of them flat and some of them none; the damage is done to copies."""
    root = tmp_path_factory.mktemp("finished") / "run"
    options = {"options": {"size": 8, "broken": 0.1, "lost": 0.1}}
    run(image_family.config(root, policy=options, training={"replay_rounds": 1}), image_family.objects())
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rewritten(root: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """Puts another table into a committed file, as if it had been committed; returns what it held."""
    path = root / name
    before = read_table(path)
    write_table(change(before), path, read_metadata(path)[1])
    commit = json.loads((path.parent / COMMIT).read_text())
    commit["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    del commit["sha256"]
    (path.parent / COMMIT).write_bytes(json_bytes(with_hash(commit)))
    return before


def samples_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    answers = [answer for item in document["compare"]["items"] for answer in item["answers"].values()]
    return {s["id"]: s for s in [*answers, *(s for item in document["prompts"]["items"] for s in item["samples"])]}


def test_every_sample_shows_the_image_that_the_ledger_holds_or_why_there_is_none(finished: Path) -> None:
    document = collect(finished).document
    shown, seen, lost = samples_of(document), 0, 0
    for round_, stage in [(1, "generate"), (2, "generate"), (0, "evaluate/generate"), (2, "evaluate/generate")]:
        for path in sorted((finished / f"round-{round_:04d}" / stage).glob("chunk-*.parquet")):
            for row in read_table(path).to_pylist():
                sample = shown[row["sample_id"]]
                if row["completion"] is None:
                    assert (sample["completion"], sample["invalid"]) == (None, "not finite")
                    lost += 1
                    continue
                found = document["images"][sample["completion"]["image"]]
                assert base64.b64decode(found["src"].partition(",")[2]) == row["completion"]
                flat = row["invalid"] is not None
                assert sample.get("invalid") == row["invalid"]
                assert (found["width"], found["height"]) == ((4, 4) if flat else (8, 8))
                seen += 1
    assert (seen + lost, 0 < lost < 30) == (2 * 32 + 2 * 24, True)
    assert (document["run"]["media"], document["missing"]) == ("image", [])
    assert (document["compare"]["rounds"], document["compare"]["of_rounds"]) == ([0, 1, 2], 3)


def test_what_it_learned_from_is_shown_also_where_it_is_replayed(finished: Path) -> None:
    document = collect(finished).document
    rows = read_table(finished / "round-0002/rows/rows.parquet").to_pylist()
    shown = {(i["sample_id"], i["origin"]): i for i in document["learned"]["items"] if i["round"] == 2}
    assert {origin for _, origin in shown} == {"round-0001", "round-0002"}
    for row in rows:
        name = shown[row["sample_id"], row["origin"]]["completion"]["image"]
        assert name == hashlib.sha256(row["completion"]).hexdigest()
        assert name in document["images"]


def test_the_overview_has_the_grid_and_what_the_images_measured(finished: Path) -> None:
    words = overview(collect(finished))
    assert words.index('id="gallery"') < words.index('id="reward"')
    for title in ("Saturation and contrast", "Brightness", "Variety of images", "Time of a round"):
        assert f"<b>{title}</b>" in words
    assert "Variety of words" not in words


def test_more_images_than_the_page_may_hold_are_left_out_and_counted(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(finished).document
    size = sum(len(picture["src"]) for picture in whole["images"].values())
    monkeypatch.setattr(report_images, "MOST_BYTES", size // 2)
    part = collect(finished).document
    assert sum(len(picture["src"]) for picture in part["images"].values()) <= size // 2
    assert part["prompts"]["shown"] < part["prompts"]["of"] == whole["prompts"]["shown"]
    assert "by hash" in part["prompts"]["chosen_by"]
    for sample in samples_of(part).values():
        assert sample["completion"] is None or sample["completion"]["image"] in part["images"]


@pytest.mark.parametrize(("renamed", "why"), [(False, "it has changed since it was generated"), (True, "it is no PNG")])
def test_an_image_that_is_damaged_is_named_and_the_others_are_shown(copy: Path, renamed: bool, why: str) -> None:
    whole = collect(copy).document

    def spoilt(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        row = next(row for row in rows if row["completion"] is not None)
        row["completion"] = b"\x89PNG\r\n\x1a\nnot one"
        if renamed:
            row["image_sha256"] = hashlib.sha256(row["completion"]).hexdigest()
        return pa.Table.from_pylist(rows, table.schema)

    rewritten(copy, SHARD, spoilt)
    document = collect(copy).document
    (line,) = document["missing"]
    assert line.startswith("round 1, generate: chunk-00000.parquet: image ")
    assert line.endswith(why)
    assert len(document["images"]) == len(whole["images"]) - 1
    assert document["prompts"]["shown"] == whole["prompts"]["shown"]


@pytest.mark.parametrize("column", ["completion", "image_sha256"])
def test_a_chunk_file_without_its_images_is_named_and_its_numbers_are_shown(copy: Path, column: str) -> None:
    shown = len(samples_of(collect(copy).document))
    rewritten(copy, "round-0002/generate/chunk-00000.parquet", lambda table: table.drop_columns([column]))
    document = collect(copy).document
    assert document["missing"] == [f"round 2, generate: chunk-00000.parquet has no column {column}"]
    assert len(samples_of(document)) == shown
    write_report(copy)


def test_a_name_that_is_no_hash_is_never_taken_for_one(copy: Path) -> None:
    def renamed(table: pa.Table) -> pa.Table:
        names = pa.array(["</script><script>"] * table.num_rows, pa.string())
        return table.set_column(table.column_names.index("image_sha256"), "image_sha256", names)

    rewritten(copy, SHARD, renamed)
    document = collect(copy).document
    assert document["missing"] == ["round 1, generate: chunk-00000.parquet names an image by something else"]
    assert "</script><script>" not in json.dumps(document)


def test_without_pillow_large_images_are_named_as_missing_and_small_ones_are_shown(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert collect(finished).document["missing"] == []
    monkeypatch.setattr(report_images, "PIXELATED", 4)
    document = collect(finished).document
    (line,) = document["missing"]
    assert line.startswith("the page: images larger than 4 pixels cannot be shown")
    assert "pip install" in line
    assert {picture["width"] for picture in document["images"].values()} == {4}
    assert document["prompts"]["shown"] == document["prompts"]["of"]


def test_latents_that_were_removed_on_purpose_are_no_damage(tmp_path: Path) -> None:
    changes = {"num_rounds": 1, "evaluation": {"num_prompts": 0}, "keep_latents": "selected"}
    run(image_family.config(tmp_path / "run", **changes), image_family.objects())
    assert 'id="gallery"' not in overview(collect(tmp_path / "run"))  # nothing is held out: there is nothing to compare
    marker = tmp_path / "run/round-0001/generate" / MARKER
    assert marker.is_file()
    assert collect(tmp_path / "run").document["missing"] == []
    marker.write_text("nothing that can be read")
    assert (
        "round 1, generate: DROPPED.json does not say what was dropped" in collect(tmp_path / "run").document["missing"]
    )
