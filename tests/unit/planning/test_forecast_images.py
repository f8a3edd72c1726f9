"""The forecast of a run of images is held to what the run then does, and to arithmetic."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import PNDMScheduler, UNet2DConditionModel
from safetensors import safe_open

from raftune.config.load import merge, validate
from raftune.config.policy import AdapterConfig
from raftune.config.run import RunConfig
from raftune.errors import DataError
from raftune.planning import Forecast, forecast
from raftune.planning.forecast import amounts
from raftune.policies.diffusion.footprint import PipelineSize, forwards_of, trained_parameters
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


def test_images_and_forwards_are_those_of_the_run(folder: Path, done: tuple[Path, Counter[str]]) -> None:
    root, counted = done
    found = planned(folder)
    assert found.work is not None
    generated = [pq.read_metadata(path).num_rows for path in root.glob("round-*/**/generate/chunk-*.parquet")]
    assert found.work.pictures == sum(generated)
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
def test_a_probe_times_generation_scoring_and_training_and_measures_an_image_s_size(folder: Path) -> None:
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


# -- arithmetic -------------------------------------------------------------------------------------------------------


def sized(**changes: Any) -> PipelineSize:
    values: dict[str, Any] = {"architecture": "StableDiffusionPipeline", "parameters": 1000, "trained": 1000}
    values |= {"dtype": "float32", "frozen": 500, "device": "cpu", "height": 512, "width": 512, "steps": 50}
    return PipelineSize(**(values | {"forwards": 102, "latents": 4 * 64 * 64 * 4} | changes))


def test_forwards_follow_from_steps_scheduler_and_guidance(folder: Path) -> None:
    def forwards(**diffusion: Any) -> int:
        model = planned(folder, sampling={"diffusion": {"num_inference_steps": 4, **diffusion}}).model
        assert isinstance(model, PipelineSize)
        return model.forwards

    assert forwards_of(PNDMScheduler(skip_prk_steps=True), 50) == 51  # takes one more than there are steps
    assert forwards(guidance_scale=2.0) == 2 * forwards(guidance_scale=1.0) >= 8


def test_an_adapter_trains_what_its_rank_and_targets_say() -> None:
    layers = {"r": 16, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    config = {"sample_size": 64, "cross_attention_dim": 768}  # Stable Diffusion 1.5
    trained = trained_parameters("UNet2DConditionModel", config, AdapterConfig(**layers))
    assert trained == 16 * 199_296  # inputs and outputs of all attention layers
    assert sized(trained=500, dtype="bfloat16").saved == 4 * 500
    assert sized(dtype="bfloat16").saved == 2 * 1000


def test_work_memory_and_disk_are_arithmetic() -> None:
    training = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "diffusion": {"noise_levels": 4}}
    changes = {"num_rounds": 2, "prompts_per_round": 10, "training": training, "sampling": {"num_generations": 5}}
    config = validate({"data": {"prompts": "-"}, "policy": {"family": "diffusion", "model": "m"}} | changes)
    model, planned_ = sized(), amounts(config, train=100, held_out=0)
    work = model.work(config, planned_)
    assert (work.pictures, work.forwards, work.learned) == (100, 100 * 102, 2 * 10 * 3 * 4)
    need = model.memory(config)
    assert (need.denoiser, need.frozen, need.trained_state) == (4 * 1000, 500, 3 * 4 * 1000)
    space = model.disk(config, planned_, sample=1000.0)
    assert space.models == 2 * 4 * model.parameters
    assert space.latents == (100 + 20) * 4 * 64 * 64 * 4
    selected = config.model_copy(update={"keep_latents": "selected"})
    assert model.disk(selected, planned_, sample=1000.0).latents == 20 * 4 * 64 * 64 * 4


def test_a_large_denoiser_is_not_tried_on_a_cpu() -> None:
    assert "not tried on a CPU" in sized(parameters=900_000_000).not_tried
    assert not sized(parameters=900_000_000, device="cuda").not_tried and not sized().not_tried
