"""Whole tiny runs of images: from whom they come, what is read how often, and what a run's rounds can be used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raftune.cli import main
from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.data.images import png_of
from raftune.errors import DataError, ModelError
from raftune.policies.diffusion import loading
from raftune.policies.diffusion.pipelines.stable_diffusion import StableDiffusion
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.evaluation_target import evaluation_of, parse_target
from raftune.runtime.run import run
from raftune.sft import sft
from tests.pipelines import SIZE, WORDS, save_tiny
from tests.runs.test_causal_lm_runs import tree
from tests.runs.test_diffusion_families import config, redness

pytestmark = pytest.mark.slow

CAPTIONS = [f"a {word} circle" for word in WORDS[:8]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("pipelines") / "sd")


def photo(number: int, side: int = SIZE) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return png_of(Image.fromarray(noise))


def objects(**columns: list[Any]) -> PythonObjects:
    asked = pa.table({"prompt": CAPTIONS, **columns})
    return PythonObjects(train=lambda: asked, held_out=lambda: asked.slice(0, 2), rewards=[redness])


def chunk_rows(root: Path, stage: str, round_: int = 1) -> list[dict[str, Any]]:
    return list(pq.read_table(root / f"round-{round_:04d}" / stage / "chunk-00000.parquet").to_pylist())


def test_a_person_s_images_and_a_teacher_s_are_ranked_beside_the_policy_s_own(model: Path, tmp_path: Path) -> None:
    teacher = save_tiny("sdxl", tmp_path / "teacher", seed=3)
    pool = {"candidate_columns": ["photo"], "teacher": {"model": str(teacher), "num_generations": 1}}
    given = objects(photo=[photo(i) for i in range(len(CAPTIONS))])
    root = tmp_path / "run"
    run(config(root, model, "sd", num_rounds=1, sampling=pool), given)
    verdicts = pq.read_table(root / "round-0001/select/verdicts.parquet").to_pylist()
    sources = {(one["k"], one["source"]) for one in verdicts}
    assert sources == {(0, "policy"), (1, "policy"), (2, "column:photo"), (3, "teacher")}
    assert all(np.isfinite(one["score"]) for one in verdicts)
    own, taught = chunk_rows(root, "generate"), chunk_rows(root, "teach")
    assert {tuple(one["latents_shape"]) for one in own + taught} == {(4, 8, 8)}, "all can be learned from"
    photos = {one["completion"] for one in own if one["source"] == "column:photo"}
    assert photos <= {photo(i) for i in range(len(CAPTIONS))} and len(photos) == 4


def test_a_teacher_that_cannot_be_trained_can_teach(model: Path, tmp_path: Path) -> None:
    """Its sampler has no known loss, and it is only generated from."""
    teacher = save_tiny("sd", tmp_path / "teacher", seed=3)
    scheduler = teacher / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_type": "continuous"}))
    base = {"num_rounds": 1, "evaluation": {"num_prompts": 0}}
    with pytest.raises(ModelError, match="count discrete times"):
        run(config(tmp_path / "trained", teacher, "sd", **base), objects())
    run(config(tmp_path / "run", model, "sd", sampling={"teacher": {"model": str(teacher)}}, **base), objects())
    assert {one["source"] for one in chunk_rows(tmp_path / "run", "teach")} == {"teacher"}


def test_an_evaluation_of_images_says_how_they_were_generated(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": CAPTIONS[0]}) + "\n")
    generated = ["--sampling.diffusion.num-inference-steps", "2", "--sampling.diffusion.guidance-scale", "1"]
    asked = ["--evaluation.prompts", str(tmp_path / "prompts.jsonl"), "--rewards.reward-funcs", "colour", *generated]
    monkeypatch.chdir(tmp_path)
    one = ["--evaluation.num-generations", "2", "--engine.threads", "1", "--policy.device", "cpu", "--report", "false"]
    assert main(["evaluate", str(model), "--policy.family", "diffusion", *asked, *one]) == 0
    assert "1 held-out prompts x 2 images, 2 steps, guidance 1" in capsys.readouterr().out.replace("\n", " ")


def test_an_image_of_another_size_is_refused_with_the_fix(model: Path, tmp_path: Path) -> None:
    given = objects(photo=[photo(i, 24) for i in range(len(CAPTIONS))])
    with pytest.raises(DataError, match=r"16 x 16; the one for prompt \S+ \(column:photo\) is 24 x 24. Crop or scale"):
        run(config(tmp_path / "run", model, "sd", sampling={"candidate_columns": ["photo"]}), given)


def test_frozen_parts_are_read_once_and_each_prompt_is_encoded_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    encoded: list[Any] = []
    pipeline, encode = loading.read_pipeline, StableDiffusion.encode

    def counted(policy: Any, source: Any, part: Any) -> Any:
        read.append(source.folder)
        return pipeline(policy, source, part)

    def counted_encode(self: StableDiffusion, prompts: Any) -> Any:
        encoded.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(loading, "read_pipeline", counted)
    monkeypatch.setattr(StableDiffusion, "encode", counted_encode)
    run(config(tmp_path / "run", model, "sd", prompts_per_round=8), objects())
    assert read == [model.resolve()] * 2, "once to check the start, and once for all rounds"
    captions = [text for text in encoded if text in CAPTIONS]
    assert sorted(captions) == sorted(CAPTIONS), "two rounds of generating, training and judging read each of them once"


def test_a_batch_too_large_for_the_device_is_halved_and_the_bytes_do_not_tell(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"sampling": {"batch_size": 2}, "num_rounds": 1, "evaluation": {"num_prompts": 0}}
    run(config(tmp_path / "small", model, "sd", **small), objects())
    draws = loading.load_denoiser

    def limited(*args: Any, train: bool) -> Any:
        denoiser = draws(*args, train=train)
        forward = denoiser.forward

        def refusing(x: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(x, *rest, **kwargs)

        if not train:
            denoiser.forward = refusing
        return denoiser

    monkeypatch.setattr(loading, "load_denoiser", limited)
    large = {**small, "sampling": {"batch_size": 8}}
    run(config(tmp_path / "large", model, "sd", **large), objects())
    generated = [chunk_rows(tmp_path / name, "generate") for name in ("small", "large")]
    assert generated[0] == generated[1]
    events = (tmp_path / "large/events.jsonl").read_text()
    assert "generated again at 4" in events and "generated again at 2" in events


def test_a_round_can_be_evaluated_and_compared_on_the_same_seeds(model: Path, tmp_path: Path) -> None:
    """What an evaluation generates of a round is what the run itself generated of it, image by image."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import numpy as np\n"
        "def red(prompts, completions, **columns):\n"
        "    return [float(np.asarray(image)[..., 0].mean()) for image in completions]\n"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in CAPTIONS))
    settings = {
        "data": {"prompts": str(prompts)},
        "rewards": {"reward_funcs": [f"{reward}:red"]},
        "evaluation": {"prompts": str(prompts)},
    }
    root = tmp_path / "run"
    run(config(root, model, "sd", policy={"adapter": {"r": 2}}, **settings))
    subject = parse_target(f"{root}@2")
    judged = evaluation_of(subject, [], {"output_dir": str(tmp_path / "judged")})
    run(judged)
    before = chunk_rows(root, "evaluate/generate", 2)
    after = chunk_rows(tmp_path / "judged", "evaluate/generate", 0)
    assert [one["completion"] for one in before] == [one["completion"] for one in after]
    assert {one["latents"] for one in before + after} == {None}


def test_an_equal_run_elsewhere_ends_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(config(tmp_path / name, model, "sd", num_rounds=1, policy={"adapter": {"r": 2}}), objects())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_pipeline_is_taught_images_of_the_size_that_is_named(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": caption, "image": f"{i}.png"} for i, caption in enumerate(CAPTIONS)]
    for i in range(len(rows)):
        (tmp_path / f"{i}.png").write_bytes(photo(i, 24))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given: dict[str, Any] = {
        "output_dir": str(tmp_path / "sft"),
        "threads": 1,
        "data": {"path": str(tmp_path / "rows.jsonl"), "held_out_fraction": 0},
        "policy": {"family": "diffusion", "model": str(model), "device": "cpu"},
        "training": {"max_steps": 1, "per_device_train_batch_size": 2},
    }
    with pytest.raises(DataError, match=r"is 24 x 24\. .* or set sampling\.diffusion\.height and \.width\."):
        sft(validate_as(SftConfig, given))
    given |= {"output_dir": str(tmp_path / "other"), "sampling": {"diffusion": {"height": 24, "width": 24}}}
    assert sft(validate_as(SftConfig, given)).report["data"]["learned"] == len(CAPTIONS)
    learned = pq.read_table(tmp_path / "other/rows.parquet").to_pylist()
    assert {tuple(row["latents_shape"]) for row in learned} == {(4, 12, 12)}
