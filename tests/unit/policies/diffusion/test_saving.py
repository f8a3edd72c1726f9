"""What a round leaves is what plain diffusers and peft load, and generates the same image there as here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open

from raftune.config.policy import AdapterConfig
from raftune.data.images import image_of
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion import lora as adapters
from raftune.policies.diffusion.loading import load_denoiser
from raftune.policies.diffusion.model_folder import LORA
from raftune.training.quiet import quiet
from tests.builders import tree_hash
from tests.pipelines import SIZE, Kind, save_tiny, tiny_pipeline
from tests.unit.policies.diffusion.fits import Parts, parts, samples_of, some_rows, trained, write_rows

LABELS = ("dit", "ddpm", "ddim")
# Whole runs go over every architecture; here is one of each form on disk and each kind of target.
BY_PEFT = ("pixart", "ddpm")
BY_PIPELINE = ("sd", "sd-v", "sd3")


def run_of(kind: Kind, root: Path, *, lora: Any, **changes: Any) -> tuple[Parts, Path, Path]:
    """Configuration, start folder and the model folder of a tiny round."""
    config = parts(save_tiny(kind, root / "pipe"), kind, lora=lora, **changes)
    rows = write_rows(root / "rows.parquet", some_rows(kind))
    out, _ = trained(config, root, rows)
    return config, root / "round-0000" / "model", out


def plainly(pipe: Any, kind: Kind, prompt: Any) -> Image.Image:
    """What a pipeline of diffusers samples by itself, seed 0, at two steps."""
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": [torch.Generator().manual_seed(0)]}
    if kind in LABELS:
        options |= {"class_labels": [prompt]} if kind == "dit" else {}
    else:
        options |= {"prompt": prompt, "height": SIZE, "width": SIZE}
    options |= {"use_resolution_binning": False} if kind == "pixart" else {}
    options |= {} if kind in ("ddpm", "ddim") else {"guidance_scale": 1.0}
    return pipe(**options).images[0]


def loaded(folder: Path) -> Any:
    with quiet():
        return diffusers.DiffusionPipeline.from_pretrained(folder)


def pixels(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def prompt_of(kind: Kind) -> Any:
    return 1 if kind in LABELS else "a red circle on white"


def same_and_changed(ours: Any, plain: Any, before: Any) -> None:
    """A rounding of the merged weights may tip a pixel over; the round itself moves many by more."""
    assert np.abs(pixels(ours) - pixels(plain)).max() <= 1
    assert np.abs(pixels(plain) - pixels(before)).max() >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", BY_PIPELINE)
def test_a_lora_saved_here_generates_our_image_in_a_plain_pipeline(tmp_path: Path, kind: Kind) -> None:
    config, start, out = run_of(kind, tmp_path, lora=True)
    prompt = prompt_of(kind)
    ours = image_of(samples_of(config, out, start, [prompt])[0].completion)
    before = plainly(loaded(tmp_path / "pipe"), kind, prompt)
    pipe = loaded(tmp_path / "pipe")
    with quiet():
        pipe.load_lora_weights(out)
    same_and_changed(ours, plainly(pipe, kind, prompt), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BY_PEFT)
def test_where_diffusers_loads_no_lora_plain_peft_does(tmp_path: Path, kind: Kind) -> None:
    config, start, out = run_of(kind, tmp_path, lora=True, learning_rate=0.3)
    prompt = prompt_of(kind)
    ours = image_of(samples_of(config, out, start, [prompt])[0].completion)
    before = plainly(loaded(tmp_path / "pipe"), kind, prompt)
    pipe = loaded(tmp_path / "pipe")
    name = "unet" if kind == "ddpm" else "transformer"
    setattr(pipe, name, PeftModel.from_pretrained(getattr(pipe, name), out).merge_and_unload())
    same_and_changed(ours, plainly(pipe, kind, prompt), before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sd-v", "flux", "dit"])
def test_a_whole_denoiser_exported_generates_our_image_in_a_plain_pipeline(tmp_path: Path, kind: Kind) -> None:
    config, start, out = run_of(kind, tmp_path, lora=False)
    prompt = prompt_of(kind)
    ours = image_of(samples_of(config, out, start, [prompt])[0].completion)
    before = plainly(loaded(tmp_path / "pipe"), kind, prompt)
    Diffusion.load(config, out, start).export(tmp_path / "exported")
    plain = plainly(loaded(tmp_path / "exported"), kind, prompt)
    assert np.array_equal(pixels(ours), pixels(plain))
    assert np.abs(pixels(plain) - pixels(before)).max() >= 4


@pytest.mark.slow
def test_the_scale_travels_with_the_lora(tmp_path: Path) -> None:
    """Another alpha over the same matrices is another image, so a reader who guesses alpha = r would be found out."""
    config, start, out = run_of("sd", tmp_path, lora=AdapterConfig(r=2, alpha=16.0))
    pipe = loaded(tmp_path / "pipe")
    with quiet():
        pipe.load_lora_weights(out)
    found = pipe.unet.peft_config["default_0"]
    assert (found.r, found.lora_alpha) == (2, 16.0)
    policy = config.policy
    ours = load_denoiser(policy, out, start, train=False).state_dict()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_exported_lora_is_the_round_s_and_holds_nothing_else(tmp_path: Path) -> None:
    config, start, out = run_of("sd", tmp_path, lora=True)
    Diffusion.load(config, out, start).export(tmp_path / "exported")
    assert tree_hash(tmp_path / "exported") == {LORA: tree_hash(out)[LORA]}


@pytest.mark.slow
def test_no_file_says_where_on_this_machine_its_part_came_from(tmp_path: Path) -> None:
    config, start, out = run_of("sd", tmp_path, lora=False)
    Diffusion.load(config, out, start).export(tmp_path / "exported")
    texts = {path: path.read_text() for root in (out, tmp_path / "exported") for path in root.rglob("*.json")}
    assert len(texts) > 5
    assert [str(path) for path, text in texts.items() if str(tmp_path) in text and path.name != "raftune.json"] == []


@pytest.mark.parametrize("lora", [False, True])
def test_read_back_a_round_s_weights_are_those_that_were_written(tmp_path: Path, lora: bool) -> None:
    config, start, out = run_of("sd3", tmp_path, lora=lora)
    denoiser = load_denoiser(config.policy, out, start, train=True)
    assert adapters.is_adapted(denoiser) == lora
    trainable = {name for name, weight in denoiser.named_parameters() if weight.requires_grad}
    assert all(("lora_" in name) == lora for name in trainable)
    if lora:
        adapters.write(denoiser, tmp_path, "transformer")
        assert (tmp_path / LORA).read_bytes() == (out / LORA).read_bytes()


def write_both_forms(folder: Path) -> None:
    """A LoRA as a pipeline reads it, and as peft does."""
    model = tiny_pipeline("sd").unet
    adapters.attach_fresh(model, AdapterConfig(target_modules=("to_q", "to_k", "to_v", "to_out.0", "conv1")), 3)
    for form, prefix in (("pipeline", "unet"), ("peft", None)):
        (folder / form).mkdir(parents=True)
        adapters.write(model, folder / form, prefix)


PROGRAM = """
import sys
from pathlib import Path
from tests.unit.policies.diffusion.test_saving import write_both_forms
write_both_forms(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_process_that_hashes_strings_otherwise_writes_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[4], env=environment, capture_output=True)
    write_both_forms(tmp_path / "here")
    assert len(tree_hash(tmp_path / "here")) == 3
    assert tree_hash(tmp_path / "here") == tree_hash(tmp_path / "there")


# -- adapters --------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_yet_and_depends_on_its_seed_alone() -> None:
    images, weights = [], []
    for seed in (0, 0, 1):
        pipe = tiny_pipeline("sd")
        torch.manual_seed(seed + 10)  # what has been generated before says nothing
        adapters.attach_fresh(pipe.unet, AdapterConfig(r=2), seed)
        images.append(pixels(plainly(pipe, "sd", "a circle")))
        flat = [weight for name, weight in pipe.unet.named_parameters() if "lora_A" in name]
        weights.append(
            hashlib.sha256(torch.cat([one.flatten() for one in flat]).detach().numpy().tobytes()).hexdigest()
        )
    plain = pixels(plainly(tiny_pipeline("sd"), "sd", "a circle"))
    assert all(np.array_equal(image, plain) for image in images)
    assert weights[0] == weights[1] != weights[2]


def test_all_linear_means_every_linear_layer_of_the_blocks_and_no_embedding() -> None:
    for kind, name in (("sd", "unet"), ("flux", "transformer"), ("dit", "transformer")):
        model = getattr(tiny_pipeline(kind), name)  # type: ignore[arg-type]
        found = adapters.targets(model, AdapterConfig())
        assert any("to_q" in one for one in found)
        assert all(isinstance(model.get_submodule(one), torch.nn.Linear) for one in found)
        blocks = [one for one, _ in model.named_children() if "block" in one]
        inside = [
            f"{b}.{n}"
            for b in blocks
            for n, m in model.get_submodule(b).named_modules()
            if isinstance(m, torch.nn.Linear)
        ]
        assert sorted(found) == sorted(inside)
        assert not any("time_embed" in one or "x_embedder" in one for one in found)


@pytest.mark.parametrize("wanted", [("to_q", "to_nowhere"), r".*\.to_nowhere"])
def test_a_target_that_matches_nothing_is_refused_with_names_that_would(wanted: Any) -> None:
    config = AdapterConfig(target_modules=wanted)
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel; '.*to_nowhere' matches none.*to_k.*all-linear"):
        adapters.attach_fresh(tiny_pipeline("sd").unet, config, 0)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("to_q", r"got 'to_q': one text is a regular expression over whole names\. Write \[to_q\]"),
        ("*.to_q", r"got '\*\.to_q', which is none \(nothing to repeat.*\)\. Write a list: \[to_q, to_v\]"),
    ],
)
def test_one_text_is_a_regular_expression_over_whole_names(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapters.targets(tiny_pipeline("sd").unet, AdapterConfig(target_modules=wanted))


def test_what_a_lora_file_cannot_hold_or_lora_cannot_adapt_is_refused() -> None:
    with pytest.raises(ConfigError, match="modules_to_save must be empty"):
        adapters.attach_fresh(tiny_pipeline("sd").unet, AdapterConfig(modules_to_save=("conv_out",)), 0)
    with pytest.raises(ConfigError, match=r"policy\.adapter must fit the denoiser"):
        adapters.attach_fresh(tiny_pipeline("sd").unet, AdapterConfig(target_modules=("conv_norm_out",)), 0)


def test_an_adapter_that_fits_nowhere_is_refused_when_the_run_starts(tmp_path: Path) -> None:
    folder = save_tiny("sd", tmp_path / "pipe")
    config = parts(folder, lora=AdapterConfig(target_modules=("q_proj",)))
    with pytest.raises(ConfigError, match="'q_proj' matches none"):
        Diffusion.start(config, tmp_path / "start")


def test_switched_off_the_denoiser_is_the_start_and_afterwards_it_is_adapted_again() -> None:
    pipe = tiny_pipeline("sd")
    plain = pixels(plainly(pipe, "sd", "a circle"))
    adapters.attach_fresh(pipe.unet, AdapterConfig(r=2), 0)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    adapted = pixels(plainly(pipe, "sd", "a circle"))
    with adapters.switched_off(pipe.unet):
        assert np.array_equal(pixels(plainly(pipe, "sd", "a circle")), plain)
    assert np.array_equal(pixels(plainly(pipe, "sd", "a circle")), adapted)
    assert not np.array_equal(adapted, plain)


@pytest.mark.parametrize("harm", ["truncated", "of another model", "without its header"])
def test_a_lora_file_that_is_damaged_or_of_another_model_is_named(tmp_path: Path, harm: str) -> None:
    unet = tiny_pipeline("sd").unet
    adapters.attach_fresh(unet, AdapterConfig(r=2), 0)
    adapters.write(unet, tmp_path, "unet")
    path = tmp_path / LORA
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif harm == "without its header":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        from safetensors.torch import save_file

        save_file(tensors, path)
    other = tiny_pipeline("sdxl" if harm == "of another model" else "sd").unet
    with pytest.raises(ModelError, match=f"{LORA} must be a LoRA of this denoiser"):
        adapters.attach(other, tmp_path)


def test_the_header_is_json_that_diffusers_reads_with_sets_in_order(tmp_path: Path) -> None:
    unet = tiny_pipeline("sd").unet
    adapters.attach_fresh(unet, AdapterConfig(target_modules=("to_v", "to_q", "to_k")), 0)
    adapters.write(unet, tmp_path, "unet")
    with safe_open(tmp_path / LORA, "pt") as file:
        header = file.metadata()
    assert list(header) == ["lora_adapter_metadata"]  # one key: several would be written in a random order
    assert json.loads(header["lora_adapter_metadata"])["unet.target_modules"] == ["to_k", "to_q", "to_v"]
