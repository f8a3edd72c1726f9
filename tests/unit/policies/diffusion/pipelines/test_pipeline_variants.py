"""Pipelines as people have them: other autoencoders, schedulers, files; taken as they are, or refused in words."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig
from PIL import Image

from raftune.config.sampling import DiffusionSampling
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion.checks import call_of, check_channels, check_not_distilled
from raftune.policies.diffusion.parity import check_parity, check_seeds
from raftune.policies.diffusion.pipelines import adapter_of
from raftune.training.quiet import quiet
from tests.pipelines import SIZE, Kind, save_tiny, tiny_pipeline
from tests.unit.policies.diffusion.fits import parts, start_of


def changed(pipe: Any, part: str, kind: type[Any] | None = None, **changes: Any) -> Any:
    """The pipeline with this network made anew, of the same sizes but for these options."""
    own = getattr(pipe, part)
    options = {name: value for name, value in own.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    setattr(pipe, part, (kind or type(own))(**{**options, **changes}).eval())
    return pipe


def scheduled(kind: Kind, name: str, **options: Any) -> Any:
    pipe = tiny_pipeline(kind)
    pipe.scheduler = getattr(diffusers, name)(**options)
    return pipe


# -- autoencoders ------------------------------------------------------------------------------------------------------


def tiny_autoencoder() -> AutoencoderTiny:
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    return AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks).eval()


def asymmetric_autoencoder() -> AsymmetricAutoencoderKL:
    down = {"down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (8, 8)}
    up = {"up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (8, 8)}
    return AsymmetricAutoencoderKL(**down, **up, norm_num_groups=4, latent_channels=4).eval()


def shifted_autoencoder() -> AutoencoderKL:
    found: AutoencoderKL = changed(tiny_pipeline("sd"), "vae", shift_factor=0.4).vae
    return found


@pytest.mark.parametrize("vae", [tiny_autoencoder, asymmetric_autoencoder, shifted_autoencoder])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "dit", "pixart"])
def test_latents_mean_what_the_pipeline_makes_of_them_whatever_its_autoencoder(
    kind: Kind, vae: Callable[[], Any]
) -> None:
    pipe = tiny_pipeline(kind)
    torch.manual_seed(0)
    pipe.vae = vae()
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_an_image_goes_through_an_autoencoder_and_back_in_the_pipeline_s_own_scale() -> None:
    """A shift_factor, which a Stable Diffusion passes over, is passed over in both directions."""
    pipe = tiny_pipeline("sd")
    pipe.vae = shifted_autoencoder()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        x0 = adapter_of(pipe).to_latents([image], torch.Generator().manual_seed(0))
        raw = pipe.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(x0, raw * pipe.vae.config.scaling_factor)


# -- what a pipeline says of itself ------------------------------------------------------------------------------------


def test_a_safety_checker_that_flags_every_image_proves_nothing_against_the_pipeline() -> None:
    pipe = tiny_pipeline("sd")
    pipe.run_safety_checker = lambda image, device, dtype: (torch.zeros_like(image), [True] * len(image))
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_a_pipeline_without_a_size_needs_the_option() -> None:
    binding = adapter_of(changed(tiny_pipeline("sd"), "unet", sample_size=None))
    with pytest.raises(ConfigError, match=r"height and .width must be given: this StableDiffusionPipeline does not"):
        call_of(binding, DiffusionSampling(height=SIZE))
    assert call_of(binding, DiffusionSampling(height=SIZE, width=24)).width == 24
    assert max(check_parity(binding).differences) == 0.0


def test_a_tokenizer_that_says_no_length_is_named() -> None:
    pipe = tiny_pipeline("sd")
    pipe.tokenizer.model_max_length = int(1e30)  # what transformers takes where nothing is said
    with pytest.raises(ModelError, match=r"must read prompts; .* failed with OverflowError.*must say model_max_length"):
        check_parity(adapter_of(pipe))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_unet_with_guidance_embedding_is_refused_as_distilled(kind: Kind) -> None:
    check_not_distilled(adapter_of(tiny_pipeline(kind)))
    binding = adapter_of(changed(tiny_pipeline(kind), "unet", time_cond_proj_dim=8))
    with pytest.raises(ModelError, match=r"UNet2DConditionModel has time_cond_proj_dim 8: it was distilled"):
        check_not_distilled(binding)


def test_a_unet_that_fills_in_images_is_refused() -> None:
    for kind in ("sd", "flux", "dit", "ddpm"):
        binding = adapter_of(tiny_pipeline(kind))  # type: ignore[arg-type]
        check_channels(binding, binding.latent_shape(SIZE, SIZE))
    binding = adapter_of(changed(tiny_pipeline("sd"), "unet", in_channels=9))
    with pytest.raises(ModelError, match=r"latents of 9 channels, and those of its AutoencoderKL have 4: it was made"):
        check_channels(binding, binding.latent_shape(SIZE, SIZE))


def test_images_of_four_channels_are_refused() -> None:
    binding = adapter_of(changed(tiny_pipeline("ddpm"), "unet", UNet2DModel, in_channels=4, out_channels=4))
    with pytest.raises(ModelError, match=r"an image becomes latents of the shape \(3, 16, 16\), where .* have \(4, "):
        check_parity(binding)


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("dit", "DDPMScheduler", {}),  # whose step is handed no generator by this pipeline
        ("dit", "EulerAncestralDiscreteScheduler", {}),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ],
)
def test_noise_that_no_seed_reaches_is_refused(kind: Kind, name: str, options: dict[str, Any]) -> None:
    for refuse in (check_parity, check_seeds):
        with pytest.raises(ModelError, match=rf"must come of its own seed; .*: its {name} samples noise that no seed"):
            refuse(adapter_of(scheduled(kind, name, **options)))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("sd", "DDPMScheduler", {}),
        ("sd", "EulerAncestralDiscreteScheduler", {}),
        ("sd", "KDPM2AncestralDiscreteScheduler", {}),
        ("sd", "SASolverScheduler", {}),
        ("sd", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("pixart", "DDPMScheduler", {}),
        ("ddpm", "DDPMScheduler", {}),
    ],
)
def test_noise_of_the_image_s_own_generator_is_taken(kind: Kind, name: str, options: dict[str, Any]) -> None:
    assert max(check_parity(adapter_of(scheduled(kind, name, **options))).differences) == 0.0


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("found") / "sd")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline, with its weights in a variant alone."""
    folder = tmp_path_factory.mktemp("found") / "half"
    with quiet():
        tiny_pipeline("sd").save_pretrained(folder, variant="fp16")
    return folder


def test_weights_that_lie_there_in_a_variant_are_read_once_it_is_named(half: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has them as fp16 alone\. Write policy\.variant: fp16"):
        start_of(parts(half), tmp_path / "a")
    with pytest.raises(ModelError, match=r"got 'bf16', and there is fp16\. Write policy\.variant: fp16"):
        start_of(parts(half, variant="bf16"), tmp_path / "b")
    start_of(parts(half, variant="fp16"), tmp_path / "c")


def test_a_variant_that_is_not_there_is_named(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"got 'fp16', and its weights have none\. Leave it out"):
        start_of(parts(kept, variant="fp16"), tmp_path)


def test_shards_of_a_variant_are_read_too(tmp_path: Path) -> None:
    with quiet():
        tiny_pipeline("sd").save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "pipe" / "unet").glob("*-of-*.safetensors"))) > 1
    start_of(parts(tmp_path / "pipe", variant="fp16"), tmp_path / "run")


def test_a_denoiser_saved_with_a_lora_on_it_must_be_merged_first(kept: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept, tmp_path / "pipe"))
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        unet.add_adapter(LoraConfig(target_modules=["to_q"]))
        unet.save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match=r"must have no LoRA on its denoiser; .*unet was saved with one\. .*fuse_lora"):
        start_of(parts(folder), tmp_path / "run")


def test_a_scheduler_that_needs_what_is_not_installed_says_so(kept: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("torchsde"):
        pytest.skip("it is installed here")
    folder = Path(shutil.copytree(kept, tmp_path / "pipe"))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverSDEScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="did not: it needs the package torchsde"):
        start_of(parts(folder), tmp_path / "run")


UNKNOWN = (
    *("StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"),
    *("StableDiffusionXLImg2ImgPipeline", "StableUnCLIPPipeline", "KandinskyV22Pipeline", "SanaPipeline"),
    *("Lumina2Pipeline", "StableCascadeDecoderPipeline", "CogVideoXPipeline", "FluxFillPipeline", "QwenImagePipeline"),
)


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_kind_of_pipeline_is_refused_by_name_before_its_weights_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.42.0"}))
    with pytest.raises(ModelError, match=rf"got a {name}\. Supported are DDIMPipeline, .*StableDiffusionXLPipeline"):
        start_of(parts(tmp_path), tmp_path / "run")


def test_an_object_of_another_kind_is_refused_before_it_is_written(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ModelError, match="got a StableDiffusionImg2ImgPipeline"):
        Diffusion.start(parts("-"), tmp_path / "model", model=other)
    assert not list((tmp_path / "model").iterdir())
