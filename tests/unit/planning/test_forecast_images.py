"""The forecast of a run of images is held to what the run then does, and to what is known of published pipelines."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from raftune.config.load import merge, validate
from raftune.config.run import RunConfig
from raftune.errors import DataError
from raftune.planning import Forecast, forecast
from raftune.planning.amounts import amounts
from raftune.policies.diffusion.footprint import PipelineSize, from_published
from raftune.policies.diffusion.published import FLUX, PUBLISHED, SD1, SDXL
from raftune.runtime.run import run
from tests.pipelines import save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("planning")
    save_tiny("sd", base / "sd")
    captions = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
    (base / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in captions))
    (base / "held_out.jsonl").write_text(json.dumps({"prompt": "a black square"}))
    return base


def configured(folder: Path, **changes: Any) -> RunConfig:
    base = {
        "output_dir": str(folder / "run"),
        "num_rounds": 2,
        "prompts_per_round": 4,
        "report": False,
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "policy": {"family": "diffusion", "model": str(folder / "sd"), "adapter": {"r": 2}, "device": "cpu"},
        "sampling": {
            "num_generations": 3,
            "batch_size": 8,
            "diffusion": {"num_inference_steps": 2, "guidance_scale": 2.0},
        },
        "rewards": {"reward_funcs": [{"spec": "colour", "options": {"measure": "brightness"}}]},
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 2, "diffusion": {"noise_levels": 3}},
        "evaluation": {"prompts": str(folder / "held_out.jsonl"), "num_generations": 2},
        "engine": {"threads": 1},
    }
    return validate(merge([base, changes]))


def planned(folder: Path, measured: bool = False, **changes: Any) -> Forecast:
    return forecast(configured(folder, **changes), measured=measured)


# -- against a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[Path, Counter[str]]:
    """A finished run, and how many images its denoiser was asked about in each stage (with gradients: `learned`)."""
    counted: Counter[str] = Counter()
    stage = ["start"]
    forward = UNet2DConditionModel.forward

    def counting(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["learned" if torch.is_grad_enabled() else stage[0]] += len(sample)
        return forward(self, sample, *args, **kwargs)

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin":
            stage[0] = facts["stage"]

    patch = pytest.MonkeyPatch()
    patch.setattr(UNet2DConditionModel, "forward", counting)
    try:
        run(configured(folder, output_dir=str(folder / "done")), observe=observe)
    finally:
        patch.undo()
    return folder / "done", counted


def test_pictures_and_forwards_are_those_of_the_run(folder: Path, done: tuple[Path, Counter[str]]) -> None:
    root, counted = done
    found = planned(folder)
    assert found.work is not None
    drawn = [pq.read_metadata(path).num_rows for path in root.glob("round-*/**/generate/chunk-*.parquet")]
    assert found.work.pictures == sum(drawn)
    assert found.work.forwards == counted["generate"] + counted["evaluation generate"]
    assert found.work.learned == counted["learned"]


def test_an_adapter_and_latents_are_as_large_as_planned(folder: Path, done: tuple[Path, Counter[str]]) -> None:
    root, _ = done
    found = planned(folder)
    assert isinstance(found.model, PipelineSize)
    with safe_open(root / "round-0001/model/pytorch_lora_weights.safetensors", "np") as file:
        assert found.model.trained == sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    [latents] = set(map(len, pq.read_table(root / "round-0001/generate/chunk-00000.parquet")["latents"].to_pylist()))
    assert found.model.latents == latents


@pytest.mark.slow
def test_a_probe_times_drawing_scoring_and_tuning_and_weighs_a_picture(folder: Path) -> None:
    found = planned(folder, measured=True)
    assert found.seconds is not None and found.probe is not None
    assert all(found.seconds[name] > 0 for name in ("generating", "scoring", "training"))
    assert found.probe.size is not None and 50 < found.probe.size < 3 * 16 * 16 + 500


def test_prompts_that_the_text_encoder_does_not_read_to_their_end_are_counted(folder: Path) -> None:
    path = folder / "long.jsonl"
    texts = ["a red circle", "a red circle on the left " * 9]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    notes = planned(folder, data={"prompts": str(path)}).notes
    assert any("1 of 3 prompts is longer than what the model reads" in note for note in notes)


def test_labels_that_a_pipeline_does_not_have_are_counted_and_named(folder: Path) -> None:
    save_tiny("dit", folder / "dit")
    for name, labels in (("train", [0, 1, 99999, 3, -1]), ("held", [1])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": label}) for label in labels))
    changes = {
        "data": {"prompts": str(folder / "train.jsonl")},
        "evaluation": {"prompts": str(folder / "held.jsonl")},
        "policy": {"model": str(folder / "dit")},
    }
    with pytest.raises(DataError, match=r"2 of 6 prompts cannot be used .*99999"):
        planned(folder, **changes)


# -- by published sizes -----------------------------------------------------------------------------------------------


def by_name(name: str, **changes: Any) -> tuple[RunConfig, PipelineSize]:
    base = {"data": {"prompts": "-"}, "policy": {"family": "diffusion", "model": name}}
    config = validate(merge([base, changes]))
    return config, from_published(PUBLISHED[name], config)


def test_denoisers_have_the_parameters_that_were_published() -> None:
    _, small = by_name("stable-diffusion-v1-5/stable-diffusion-v1-5")
    _, large = by_name("stabilityai/stable-diffusion-xl-base-1.0")
    assert (small.parameters, large.parameters) == (859_520_964, 2_567_463_684)
    assert (small.trained, small.weight) == (small.parameters, 4)


def test_forwards_follow_from_steps_scheduler_and_guidance() -> None:
    def forwards(name: str, **diffusion: Any) -> int:
        return by_name(name, sampling={"diffusion": diffusion})[1].forwards

    first = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert forwards(first) == 2 * 51  # its scheduler takes one more than there are steps
    assert forwards(first, guidance_scale=1.0, num_inference_steps=20) == 21
    assert forwards("black-forest-labs/FLUX.1-dev", guidance_scale=3.5) == 28  # told to the denoiser, not asked twice
    twice = {"pipeline_kwargs": {"true_cfg_scale": 4.0}}
    assert forwards("black-forest-labs/FLUX.1-dev", **twice) == 56


def test_an_adapter_trains_what_its_rank_and_targets_say() -> None:
    targets = {"r": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    _, model = by_name("stable-diffusion-v1-5/stable-diffusion-v1-5", policy={"adapter": targets})
    assert model.trained == 16 * 199_296  # inputs and outputs of all attention layers
    assert model.kept == 4 * model.trained


def test_work_memory_and_disk_are_arithmetic() -> None:
    training = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "diffusion": {"noise_levels": 4}}
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config, model = by_name(
        name, num_rounds=2, prompts_per_round=10, training=training, sampling={"num_generations": 5}
    )
    planned_ = amounts(config, train=100, held_out=0)
    work = model.work(config, planned_)
    assert (work.pictures, work.forwards, work.learned) == (100, 100 * 102, 2 * 10 * 3 * 4)
    need = model.memory(config)
    assert need.denoiser == 4 * model.parameters and need.trained_state == 3 * need.denoiser
    assert need.outputs == int(SD1.outputs * 2 * 4 * 4)
    space = model.disk(config, planned_, sample=1000.0)
    assert space.models == 2 * 4 * model.parameters
    assert space.latents == (100 + 20) * 4 * 64 * 64 * 4
    selected = config.model_copy(update={"keep_latents": "selected"})
    assert model.disk(selected, planned_, sample=1000.0).latents == 20 * 4 * 64 * 64 * 4


@pytest.mark.parametrize(("known", "billions"), [(SD1, 0.86), (SDXL, 2.57), (FLUX, 11.9)])
def test_a_forward_takes_at_least_what_each_weight_does_at_every_place(known: Any, billions: float) -> None:
    """Two operations for each weight and token hold for a transformer; a UNet halves its grid three times."""
    tokens = (known.size // 16) ** 2 if known is FLUX else (known.size // 8 // 4) ** 2
    assert known.flops > billions * 1e9 * tokens
