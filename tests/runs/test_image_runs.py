"""Whole runs of images: measured, guarded, browsed, compared, asked what if, and read by other people's tools."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from raftune.data.images import image_of, png_of, require_pillow
from raftune.errors import ConfigError
from raftune.evaluation.images import looked_at
from raftune.results.summary import alarms_of, columns_for, rows_of
from raftune.runtime.assembly import PythonObjects, Runtime
from raftune.runtime.run import run, verify
from raftune.stages.evaluate import EvaluateStage
from raftune.store.commit import FileEntry, Manifest
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.image_family import captions, config, indifferent, objects, saturation

MANY: dict[str, Any] = {"prompts_per_round": 20, "sampling": {"num_generations": 8, "chunk_size": 8}}
SATURATION = {"spec": "tests.runs.image_family:saturation"}
DARKNESS = {"spec": "tests.runs.image_family:darkness"}


@pytest.fixture(scope="module")
def vivid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose reward wants colours, and gets them."""
    root = tmp_path_factory.mktemp("vivid") / "run"
    held_out = {"reward_funcs": [DARKNESS]}
    run(
        config(root, num_rounds=4, rewards={"reward_funcs": [SATURATION]}, evaluation=held_out, **MANY),
        python_objects(),
    )
    return root


def python_objects() -> PythonObjects:
    prompts = objects()
    return PythonObjects(train=prompts.train, held_out=prompts.held_out)


def metrics(root: Path, round_: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"round-{round_:04d}/evaluate/metrics.json").read_text())
    return found


def called(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(list(words)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


# -- measures and alarms ----------------------------------------------------------------------------------------------


def test_images_are_measured_in_every_round(vivid: Path) -> None:
    first, last = metrics(vivid, 0), metrics(vivid, 4)
    for name in ("brightness", "saturation", "contrast", "saturated_ratio", "pixel_distance"):
        assert 0 <= last[name]["low"] <= last[name]["mean"] <= last[name]["high"] <= 1
    assert last["saturation"]["low"] > first["saturation"]["high"]
    assert last["invalid_ratio"] == 0 and 0 <= last["near_duplicates"] <= 1


def test_the_saturation_of_the_metrics_is_that_of_the_images_on_disk(vivid: Path) -> None:
    paths = sorted((vivid / "round-0004/evaluate/generate").glob("chunk-*.parquet"))
    table = pa.concat_tables(pq.read_table(path, columns=["prompt_id", "completion"]) for path in paths)
    values: dict[str, list[float]] = {}
    for row in table.to_pylist():
        pixels = np.asarray(image_of(row["completion"]), np.float64)
        high, low = pixels.max(axis=2), pixels.min(axis=2)
        values.setdefault(row["prompt_id"], []).append(float(((high - low) / np.maximum(high, 1)).mean()))
    mean = np.mean([np.mean(group) for group in values.values()])
    assert metrics(vivid, 4)["saturation"]["mean"] == pytest.approx(mean, abs=1e-9)


def test_the_table_of_rounds_has_the_columns_of_images_and_none_of_texts(vivid: Path) -> None:
    titles = [column.title for column in columns_for(rows_of(vivid))]
    assert (titles[0], titles[1].split()[0]) == ("round", "reward")
    assert {"saturation", "contrast", "pixels", "invalid"} <= set(titles)
    assert not {"length", "distinct-2", "MSTTR", "KL", "Vendi"} & set(titles)


def test_a_run_that_saturates_its_images_raises_the_alarm(vivid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {alarm["alarm"]: alarm for round_ in range(1, 5) for alarm in alarms_of(RunFolder(vivid), round_)}
    assert "saturation_drifts" in found
    assert found["saturation_drifts"]["samples"]
    said = called(capsys, "alarms", str(vivid), "-n", "1")
    assert "What was kept is much more saturated than what was generated" in said
    assert ".png 16×16" in said


def test_a_reward_that_does_not_care_how_images_look_raises_none(tmp_path: Path) -> None:
    """Five rounds of winners by chance, the family's start left where it is."""
    still = {"policy": {"family": "tests.runs.image_family:SketchFamily", "options": {"size": 16, "step": 0.0}}}
    run(config(tmp_path / "run", num_rounds=5, evaluation={"num_prompts": 0}, **MANY, **still), objects(indifferent))
    assert [alarms_of(RunFolder(tmp_path / "run"), round_) for round_ in range(1, 6)] == [[]] * 5


def test_an_alarm_of_images_can_end_a_run(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", num_rounds=6, guards={"stop_on": "saturation_drifts"}, **MANY)
    outcome = run(settings, objects())
    assert outcome.rounds < 6 and "saturation" in outcome.reason


def test_alarms_of_the_other_medium_cannot_be_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length_drifts is about texts"):
        run(config(tmp_path / "a", guards={"stop_on": ["length_drifts"]}), objects())
    with pytest.raises(ConfigError, match="contrast_drops is about images"):
        run(tiny.config(tmp_path / "b", guards={"stop_on": ["contrast_drops"]}), tiny.objects())


# -- features ---------------------------------------------------------------------------------------------------------


class Extractor:
    """Sees an image as its mean colour, from black."""

    fingerprint = "mean colour"
    calls: tuple[int, ...] = ()

    def image_features(self, images: Any) -> Any:
        self.calls += (len(images),)
        colours = [np.asarray(image, np.float32).mean(axis=(0, 1)) - 128 for image in images[0 : len(images)]]
        return np.stack(colours) if colours else np.zeros((0, 3), np.float32)


def test_features_say_how_varied_images_are_and_how_far_they_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = Extractor()
    monkeypatch.setattr(Runtime, "extractor", lambda self: extractor)
    broken = {"policy": {"family": "tests.runs.image_family:SketchFamily", "options": {"size": 16, "broken": 0.1}}}
    run(config(tmp_path / "run", evaluation={"features": "any"}, **broken), objects())
    start, last = metrics(tmp_path / "run", 0), metrics(tmp_path / "run", 2)
    assert start["feature_drift"]["mean"] == pytest.approx(0, abs=1e-6)
    assert last["feature_drift"]["low"] > 0
    assert 1 <= last["vendi"]["mean"] <= 3 and 0 <= last["feature_distance"]["mean"] <= 2
    shard = pq.read_table(tmp_path / "run/round-0001/evaluate/features/chunk-00000.parquet")
    generated = pq.read_table(tmp_path / "run/round-0001/evaluate/generate/chunk-00000.parquet")
    assert shard.column("sample_id").equals(generated.column("sample_id"))
    assert shard.column("features").is_null().equals(generated.column("invalid").is_valid())
    before = extractor.calls
    run(config(tmp_path / "run", evaluation={"features": "any"}, **broken), objects())
    assert extractor.calls == before and verify(tmp_path / "run") == []


def test_features_of_what_is_no_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.features compares images, and policy\.family: tabular"):
        run(tiny.config(tmp_path / "run", evaluation={"features": "clip"}), tiny.objects())
    with pytest.raises(ConfigError, match=r"evaluation\.features needs held-out prompts"):
        config(tmp_path / "run", evaluation={"features": "clip", "num_prompts": 0})


# -- what people do with a run ----------------------------------------------------------------------------------------


def test_samples_shows_names_sizes_and_scores(vivid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = called(capsys, "samples", str(vivid), "--round", "2", "-n", "2")
    first = pq.read_table(vivid / "round-0002/generate/chunk-00000.parquet").to_pylist()[0]
    assert f"{first['image_sha256'][:12]}.png 16×16" in said
    assert "PNG" not in said and "★" in said
    lines = called(capsys, "samples", str(vivid), "--round", "2", "-n", "1", "--json").splitlines()
    assert [json.loads(line)["image_sha256"] for line in lines].count(first["image_sha256"]) == 1


def test_images_are_saved_under_harmless_names_as_an_image_folder(
    vivid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    said = called(capsys, "samples", str(vivid), "--round", "1", "-n", "3", "--save", str(out))
    assert f"Wrote 24 images and metadata.jsonl to {out}." in said
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and all(line["prompt"].startswith("a ") for line in lines)
    for line in lines:
        found = re.fullmatch(r"00[123]-(.*)-k(\d\d)-([+-].*)\.png", line["file_name"])
        assert found is not None
        assert (int(found[2]), float(found[3])) == (line["k"], pytest.approx(line["score"], abs=1e-3))
        assert found[1] == line["prompt"].replace(",", "").replace(" ", "-")[:40]
    sheet = image_of((tmp_path / "out-contact-sheet.png").read_bytes())
    assert sheet.width >= 8 * 96 and sheet.height >= 3 * 96  # a row for each prompt, K images in it
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.num_rows == 24 and loaded[0]["image"].size == (16, 16)
    assert main(["samples", str(vivid), "--save", str(out)]) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err


def test_hostile_prompts_name_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = pa.table({"prompt": ["../../up", "/etc/passwd", "a\nb", "<img src=x>", "con", "a" * 3000]})
    whole = PythonObjects(train=lambda: prompts, rewards=[saturation])
    run(config(tmp_path / "run", num_rounds=1, evaluation={"num_prompts": 0}), whole)
    called(capsys, "samples", str(tmp_path / "run"), "-n", "6", "--save", str(tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()} - {"metadata.jsonl"}
    assert names and all(re.fullmatch(r"[0-9]{3}-[a-z0-9+.-]{1,70}\.png", name) for name in names)


def test_a_text_run_has_no_images_to_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    assert main(["samples", str(tmp_path / "run"), "--save", str(tmp_path / "out")]) == 2
    assert "these samples hold none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_rounds_are_compared_by_their_rewards(
    vivid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs.parquet"
    found = json.loads(
        called(capsys, "compare", f"{vivid}@4", f"{vivid}@start", "--by", "reward", "--json", "--out", str(out))
    )
    assert found["measures"]["reward"]["win_rate"]["mean"] > 0.5
    assert found["wins"][0]["a"].endswith(".png 16×16")
    assert image_of(pq.read_table(out).column("a")[0].as_py()).size == (16, 16)
    said = called(capsys, "compare", f"{vivid}@4", "--show", "1", "--reward", DARKNESS["spec"])
    assert "darkness" in said and ".png 16×16" in said


def test_a_judge_of_texts_is_not_asked_about_images(vivid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(vivid), "--judge", "http://127.0.0.1:9/v1", "--judge-model", "none"]) == 2
    assert "--judge reads texts, and A and B hold images" in capsys.readouterr().err


@pytest.mark.slow
def test_what_ifs_read_images(vivid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(shutil.copytree(vivid, tmp_path / "run"))
    found = json.loads(called(capsys, "rescore", str(root), "--rewards.reward_funcs", json.dumps([DARKNESS]), "--json"))
    assert found["rounds"] == [1, 2, 3, 4]
    assert ".png 16×16" in json.dumps(found, ensure_ascii=False)
    said = called(capsys, "select", str(root), "--selection.rule", "random")
    assert "best_of_k → random" in said


def test_other_tools_read_the_images_unaided(vivid: Path, tmp_path: Path) -> None:
    files = [str(path) for path in sorted((vivid / "round-0003/generate").glob("*.parquet"))]
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    shown = loaded.cast_column("completion", datasets.Image())
    assert shown.num_rows == 160
    assert shown[0]["completion"].size == (16, 16) and shown[0]["completion"].mode == "RGB"


def test_images_of_a_column_join_the_pool(tmp_path: Path) -> None:
    """A file's bytes, as a data set of one's own may hold them, compete with what is generated."""
    source = pq.read_table(_generated(tmp_path), columns=["completion"]).column("completion").to_pylist()
    prompts = captions(8).append_column("human", pa.array(source[:8], pa.binary()))
    sampling = {"num_generations": 2, "chunk_size": 4, "candidate_columns": ["human"]}
    settings = config(tmp_path / "run", num_rounds=1, evaluation={"num_prompts": 0}, sampling=sampling)
    run(settings, PythonObjects(train=lambda: prompts, rewards=[saturation]))
    generated = pq.read_table(tmp_path / "run/round-0001/generate/chunk-00000.parquet").to_pylist()
    human = [row for row in generated if row["source"] == "column:human"]
    assert len(human) == 4 and all(row["completion"] in source for row in human)


def _generated(folder: Path) -> Path:
    run(config(folder / "source", num_rounds=1, evaluation={"num_prompts": 0}), objects())
    return folder / "source/round-0001/generate/chunk-00000.parquet"


def test_an_evaluation_holds_one_chunk_of_images_at_a_time(tmp_path: Path) -> None:
    """Twelve units of eight noisy images, 12 kB each: what is held when the last is looked at is one chunk's bytes."""
    size, chunks, generator = 8, 12, np.random.default_rng(0)
    for chunk in range(chunks):
        ids = [f"{chunk}/{k}" for k in range(size)]
        noise = generator.integers(0, 256, (size, 64, 64, 3), dtype=np.uint8)
        generated = {
            "sample_id": ids,
            "prompt_id": [f"p{chunk}"] * size,
            "k": list(range(size)),
            "source": ["policy"] * size,
        }
        table = pa.table(generated | {"completion": [png_of(require_pillow().fromarray(one)) for one in noise]})
        for folder, columns in (("generate", table), ("score", table.drop_columns("completion"))):
            (tmp_path / folder).mkdir(exist_ok=True)
            pq.write_table(columns, tmp_path / folder / f"chunk-{chunk:05d}.parquet")
    for folder in ("generate", "score"):
        files = {path.name: FileEntry.of(path) for path in (tmp_path / folder).iterdir()}
        Manifest(folder, 0, "", {}, {}, files).save(tmp_path / folder, tmp_path / "tmp")
    held: list[int] = []

    def looking(samples: pa.Table) -> pa.Table:
        held.append(pa.total_allocated_bytes())
        return looked_at(samples)

    stage = EvaluateStage((), shards=("generate", "score"), media="image", condense=looking)
    whole = stage.samples({"evaluate/generate": tmp_path / "generate", "evaluate/score": tmp_path / "score"})
    one = (tmp_path / "generate" / "chunk-00000.parquet").stat().st_size
    assert whole.num_rows == chunks * size and whole.nbytes < chunks * one / 10
    assert max(held) - held[0] < one
