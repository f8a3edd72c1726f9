"""From a name or a folder to a start, and from a round's folder to a policy."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raftune.config.policy import DiffusionPolicy
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion.loading import load_denoiser, load_pipeline
from raftune.policies.diffusion.model_folder import ModelRecord, fingerprint, read_record
from tests.pipelines import save_tiny, tiny_pipeline
from tests.unit.policies.diffusion.fits import Parts, parts, samples_of, some_rows, start_of, trained, write_rows


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture
def model(kept: Path, tmp_path: Path) -> Path:
    """A pipeline of the test's own, to be damaged."""
    return Path(shutil.copytree(kept, tmp_path / "pipeline"))


def weights(policy: Diffusion) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in policy.sampler.denoiser.named_parameters()}


# -- what is no pipeline -----------------------------------------------------------------------------------------------


def without_unet(model: Path) -> None:
    shutil.rmtree(model / "unet")


def without_weights(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()


def with_pickles(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")


def without_vocabulary(model: Path) -> None:
    for path in (model / "tokenizer").iterdir():
        path.unlink()


def without_scheduler(model: Path) -> None:
    (model / "scheduler" / "scheduler_config.json").unlink()


def without_index(model: Path) -> None:
    (model / "model_index.json").unlink()


def as_one_model(model: Path) -> None:
    without_index(model)
    shutil.copyfile(model / "unet" / "config.json", model / "config.json")


def as_lora(model: Path) -> None:
    without_index(model)
    (model / "pytorch_lora_weights.safetensors").touch()


def of_another_class(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))


def with_code(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Mine"]}))


def with_edm(model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))


def with_half_a_denoiser(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[5:]), path, metadata={"format": "pt"})


def with_nan(model: Path) -> None:
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_unet, r"must be a whole pipeline; .* lacks the folder unet/ \(UNet2DConditionModel\)"),
        (without_weights, r"lacks the weights vae/\*.safetensors \(AutoencoderKL\)"),
        (with_pickles, r"there are only pickled, and only safetensors are read"),
        (without_vocabulary, r"lacks tokenizer/tokenizer.json \(CLIPTokenizer"),
        (without_scheduler, r"lacks scheduler/scheduler_config.json"),
        (without_index, r"has no model_index.json. Name a folder that save_pretrained wrote"),
        (as_one_model, r"It holds a single model: name the folder of the whole pipeline"),
        (as_lora, r"It holds a LoRA alone"),
        (of_another_class, r"got a StableDiffusionInpaintPipeline. Supported are .*StableDiffusionPipeline"),
        (with_code, r"brings code of its own .*, which is never run"),
        (with_edm, r"scheduler must be one whose training loss is known; got EDMEulerScheduler"),
        (with_half_a_denoiser, r"unet lacks 5 \(.*\), which would be random"),
        (with_nan, r"must have finite weights; unet/conv_in.bias has a NaN"),
    ],
)
def test_an_incomplete_pipeline_folder_is_refused_with_what_it_lacks(
    damage: Callable[[Path], None], message: str, model: Path, tmp_path: Path
) -> None:
    damage(model)
    with pytest.raises(ModelError, match=message):
        start_of(parts(model), tmp_path)


def test_an_unknown_name_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"got 'nobody/nothing'.*HF_HUB_OFFLINE is set") as caught:
        start_of(parts("nobody/nothing"), tmp_path / "a")
    said = str(caught.value).replace(str(Path.cwd()), "")
    assert len(said) < 260, "the hub's own page about it is left out"
    with pytest.raises(ModelError, match=r"got './nothing', and .*nothing is no folder"):
        start_of(parts("./nothing"), tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"torch_dtype": "float16"}, r"must not hold 'torch_dtype': raftune sets it. Use policy.dtype"),
        ({"trust_remote_code": True}, r"must not hold 'trust_remote_code': raftune sets it. Remove it"),
        ({"saftey_checker": None}, r"must be what StableDiffusionPipeline takes; got 'saftey_checker'"),
        ({"vae": "elsewhere"}, r"may leave a part out; got vae: 'elsewhere'"),
    ],
)
def test_options_of_loading_that_cannot_be_followed_are_refused(
    given: dict[str, Any], message: str, kept: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        start_of(parts(kept, pipeline_init_kwargs=given), tmp_path)


@pytest.mark.slow
def test_a_part_that_is_not_needed_can_be_left_out(model: Path, tmp_path: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks the folder safety_checker/ .*pipeline_init_kwargs"):
        start_of(parts(model), tmp_path / "a")
    without = parts(model, pipeline_init_kwargs={"safety_checker": None})
    assert samples_of(without, start := start_of(without, tmp_path / "b"), start)


def test_a_device_that_is_not_there_is_named(kept: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ConfigError, match=r"policy.device must be a device of this machine; got 'cuda'"):
        start_of(parts(kept, device="cuda"), tmp_path)


# -- options of other families -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("sampling", "temperature", 0.7),
        ("sampling", "top_p", 0.9),
        ("sampling", "system_prompt", "Be kind."),
        ("training", "mask_truncated_completions", True),
    ],
)
def test_text_options_are_refused_for_images(section: str, option: str, value: Any, kept: Path, tmp_path: Path) -> None:
    config = parts(kept)
    changed = replace(config, **{section: getattr(config, section).model_copy(update={option: value})})
    with pytest.raises(ConfigError, match=f"{section}.{option} means nothing to the diffusion family"):
        start_of(changed, tmp_path)


# -- the start ---------------------------------------------------------------------------------------------------------


def test_a_named_pipeline_becomes_a_reference_with_a_hash(kept: Path, tmp_path: Path) -> None:
    start = start_of(parts(kept), tmp_path)
    assert read_record(start) == ModelRecord("reference", str(kept.resolve()), None, fingerprint(kept))
    assert [path.name for path in start.iterdir()] == ["raftune.json"]


def test_a_pipeline_that_changes_or_goes_during_the_run_is_noticed(model: Path, tmp_path: Path) -> None:
    start = start_of(parts(model), tmp_path)
    Diffusion.verify(start)
    (model / "README.md").write_text("said about it")
    Diffusion.verify(start)
    with (model / "vae" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ModelError, match=r"must not change during a run; .* was \w{12} and is \w{12}"):
        Diffusion.verify(start)
    shutil.rmtree(model)
    with pytest.raises(ModelError, match=r"must still be where the run began; .* is gone"):
        Diffusion.verify(start)


@pytest.mark.slow
def test_a_pipeline_given_as_an_object_is_written_whole_and_samples_the_same(kept: Path, tmp_path: Path) -> None:
    named, given = start_of(parts(kept), tmp_path / "named"), tmp_path / "given" / "round-0000" / "model"
    Diffusion.start(parts("-"), given, model=tiny_pipeline("sd"))
    assert read_record(given).kind == "pipeline"
    Diffusion.verify(given)
    assert [s.completion for s in samples_of(parts("-"), given, given)] == [
        s.completion for s in samples_of(parts(kept), named, named)
    ]


@pytest.mark.slow
def test_a_hub_name_is_held_at_the_commit_that_it_stood_for(kept: Path, tmp_path: Path) -> None:
    repository, commit = tmp_path / "hub" / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(kept, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = parts("someone/tiny", pipeline_init_kwargs={"cache_dir": str(tmp_path / "hub")})
    start = start_of(config, tmp_path / "run")
    assert read_record(start) == ModelRecord("reference", "someone/tiny", commit, f"hub:{commit}")
    Diffusion.verify(start)
    named = start_of(parts(kept), tmp_path / "named")
    assert samples_of(config, start, start)[0].completion == samples_of(parts(kept), named, named)[0].completion


def test_an_object_that_is_no_pipeline_or_has_a_lora_on_it_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ModelError, match=r"must be a pipeline of diffusers; got a UNet2DConditionModel"):
        Diffusion.start(parts("-"), tmp_path / "a", model=pipe.unet)
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ModelError, match=r"must have no LoRA on it; its unet has one"):
        Diffusion.start(parts("-"), tmp_path / "b", model=pipe)


def test_what_the_start_is_is_reported_for_planning(kept: Path, tmp_path: Path) -> None:
    facts = Diffusion.start(parts(kept), tmp_path / "model")
    assert facts["architecture"] == "StableDiffusionPipeline"
    assert facts["latents_shape"] == [4, 8, 8] and facts["forwards_per_step"] == 1
    assert facts["parameters"] == sum(w.numel() for w in tiny_pipeline("sd").unet.parameters())


# -- what is shared, and what is fresh ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_frozen_parts_are_read_once_for_a_start_and_released_with_its_last_policy(kept: Path, tmp_path: Path) -> None:
    config = parts(kept)
    start = start_of(config, tmp_path)
    first, second = (Diffusion.load(config, start, start) for _ in range(2))
    assert first.shared is second.shared
    assert first.frozen.pipe.vae is second.frozen.pipe.vae
    assert first.sampler.denoiser is not second.sampler.denoiser
    number = id(first.shared)
    held = load_pipeline(config.policy, start)
    assert id(held) == number
    del first, second, held
    gc.collect()
    again = load_pipeline(config.policy, start)
    assert "pipe" not in vars(again), "nobody held them: they are read anew"


def test_every_drawer_has_a_scheduler_of_its_own(kept: Path, tmp_path: Path) -> None:
    """A scheduler that is told its steps shrinks its tables: another round must not see that."""
    config = parts(kept)
    start = start_of(config, tmp_path)
    first, second = (Diffusion.load(config, start, start) for _ in range(2))
    first.sampler.pipe.scheduler.set_timesteps(3)
    assert len(second.sampler.pipe.scheduler.timesteps) == len(second.frozen.pipe.scheduler.timesteps) == 1000


@pytest.mark.slow
def test_bytes_are_counted_as_they_are_read(kept: Path, tmp_path: Path) -> None:
    config = parts(kept)
    policy = Diffusion.load(config, start := start_of(config, tmp_path), start)
    gc.collect()
    assert policy.nbytes == 0
    frozen = sum(nbytes(tiny_pipeline("sd"), name) for name in ("vae", "text_encoder"))
    assert policy.call.height == 16
    assert policy.nbytes == frozen
    assert policy.sampler and policy.nbytes == frozen + nbytes(tiny_pipeline("sd"), "unet")


def nbytes(pipe: Any, part: str) -> int:
    return sum(weight.nbytes for weight in getattr(pipe, part).parameters())


def test_weights_are_of_the_configured_type(kept: Path, tmp_path: Path) -> None:
    config = parts(kept, dtype="bfloat16")
    policy = Diffusion.load(config, start := start_of(config, tmp_path), start)
    assert policy.sampler.denoiser.dtype == policy.frozen.pipe.vae.dtype == torch.bfloat16
    [sample] = samples_of(config, start, start, ["a red circle"])
    assert sample.payload["latents_dtype"] == "bfloat16" and len(sample.payload["latents"]) == 2 * 4 * 8 * 8


# -- rounds, and runs that begin from one ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_starts_from_a_round_generates_what_the_round_generated(
    lora: bool, kept: Path, tmp_path: Path
) -> None:
    config = parts(kept, lora=lora)
    rows = write_rows(tmp_path / "rows.parquet", some_rows())
    folder, _ = trained(config, tmp_path / "run", rows)
    start = start_of(config, tmp_path / "run")
    expected = [s.payload["latents"] for s in samples_of(config, folder, start)]
    assert expected != [s.payload["latents"] for s in samples_of(config, start, start)], "the round learned something"

    section = Diffusion.section_at(config.policy.model_dump(), folder.resolve(), start.resolve())
    for rounds in (0, 1):  # to evaluate it, and to go on from it
        later = replace(config, policy=DiffusionPolicy(**section), num_rounds=rounds)
        begins = start_of(later, tmp_path / f"later-{rounds}")
        Diffusion.verify(begins)
        assert [s.payload["latents"] for s in samples_of(later, begins, begins)] == expected
    assert read_record(begins).kind == "full", "a LoRA is merged, so that the next one begins from zero"


@pytest.mark.slow
def test_a_round_rests_on_a_start_that_was_a_round_itself(kept: Path, tmp_path: Path) -> None:
    """A LoRA of the later run lies on the earlier run's merged one, not on the pipeline beneath both."""
    config = parts(kept, lora=True)
    rows = write_rows(tmp_path / "rows.parquet", some_rows())
    folder, _ = trained(config, tmp_path / "run", rows)
    later = later_than(config, folder, tmp_path)
    second, _ = trained(later, tmp_path / "later", rows)
    start = start_of(later, tmp_path / "later")
    expected = [s.payload["latents"] for s in samples_of(later, second, start)]
    again = replace(later_than(later, second, tmp_path), num_rounds=0)
    begins = start_of(again, tmp_path / "evaluation")
    assert read_record(begins).kind == "adapter"
    assert [s.payload["latents"] for s in samples_of(again, begins, begins)] == expected


def later_than(config: Parts, folder: Path, root: Path) -> Parts:
    """The configuration of a run that begins from this folder."""
    section = Diffusion.section_at(config.policy.model_dump(), folder.resolve(), root)
    return replace(config, policy=DiffusionPolicy(**section))


def test_section_at_the_start_of_a_named_pipeline_is_the_section_itself(kept: Path, tmp_path: Path) -> None:
    config = parts(kept)
    start = start_of(config, tmp_path)
    assert Diffusion.section_at(config.policy.model_dump(), start, start) == config.policy.model_dump()


def test_a_folder_that_does_not_say_what_it_holds_is_refused(kept: Path, tmp_path: Path) -> None:
    config = parts(kept)
    start = start_of(config, tmp_path)
    (start / "raftune.json").write_text("{")
    with pytest.raises(ModelError, match=r"must say in raftune.json what it holds"):
        load_denoiser(config.policy, start, start, train=False)


def test_image_options_are_refused_for_tables() -> None:
    from raftune.config import validate
    from raftune.policies.tabular.policy import Tabular

    tabular = {"data": {"prompts": "-"}, "policy": {"family": "tabular"}}
    for section, value in (
        ("sampling", {"diffusion": {"height": 64}}),
        ("training", {"diffusion": {"ema_decay": 0.9}}),
    ):
        config: RunConfig = validate({**tabular, section: value})
        with pytest.raises(ConfigError, match=rf"{section}.diffusion means nothing to the tabular family; got"):
            Tabular.start(config, Path("nowhere"))
    with pytest.raises(ConfigError, match=r"keep_latents means nothing to the tabular family; got 'selected'"):
        Tabular.start(validate({**tabular, "keep_latents": "selected"}), Path("nowhere"))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_damaged_weights_are_named_with_what_to_do(model: Path, tmp_path: Path, part: str) -> None:
    weights = next((model / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"\(500 bytes\) is cut short or damaged .* Copy or download it again"):
        Diffusion.start(parts(model), tmp_path / "start")
