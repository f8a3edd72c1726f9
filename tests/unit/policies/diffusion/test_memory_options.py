"""Options of the diffusion policy that save memory: what they leave as it was, and where they are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raftune.arrays import FloatArray
from raftune.errors import ConfigError
from raftune.policies.diffusion import Diffusion
from tests.builders import chunk_of
from tests.pipelines import save_tiny
from tests.unit.policies.diffusion.fits import TEXTS, parts


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("pipelines") / "sd")


class OnTheCPU(Diffusion):
    """Offloads from a CPU to a CPU: the hooks are those of a GPU, and nothing moves."""

    def check_offload(self) -> None:
        torch.set_num_threads(1)


def pixels(model: Path, folder: Path, family: type[Diffusion] = Diffusion, **options: Any) -> FloatArray:
    """(N, H, W, 3) levels of the images of four prompts, generated twice."""
    config = parts(model, **options)
    family.start(config, folder)
    policy = family.load(config, folder, folder)
    samples = [*policy.generate(chunk_of(TEXTS, 1)), *policy.generate(chunk_of(TEXTS[:1], 2))]
    return np.stack([np.asarray(Image.open(io.BytesIO(s.completion)), dtype=np.float64) for s in samples])


@pytest.mark.slow
def test_a_vae_in_slices_or_tiles_gives_the_same_images_below_the_size_of_a_tile(sd: Path, tmp_path: Path) -> None:
    plain = pixels(sd, tmp_path / "plain")
    for option in ("vae_slicing", "vae_tiling"):
        assert np.abs(pixels(sd, tmp_path / option, **{option: True}) - plain).max() <= 1
        policy = Diffusion.load(parts(sd, **{option: True}), tmp_path / option, tmp_path / option)
        assert getattr(policy.frozen.pipe.vae, option.replace("vae_", "use_"))


def test_parts_that_are_brought_one_by_one_give_the_same_images_and_leave_no_hooks(sd: Path, tmp_path: Path) -> None:
    plain = pixels(sd, tmp_path / "plain")
    assert np.array_equal(pixels(sd, tmp_path / "offloaded", OnTheCPU, cpu_offload=True), plain)
    policy = OnTheCPU.load(parts(sd, cpu_offload=True), tmp_path / "plain", tmp_path / "plain")
    policy.generate(chunk_of(TEXTS, 1))
    assert not any(hasattr(module, "_hf_hook") for module in (*policy.frozen.modules.values(), policy.sampler.denoiser))


def test_offloading_without_a_gpu_and_slicing_without_a_vae_are_refused(sd: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.cpu_offload needs a CUDA device, .* got cpu\. Leave it out\."):
        Diffusion.start(parts(sd, cpu_offload=True), tmp_path / "a")
    pixel_model = save_tiny("ddpm", tmp_path / "ddpm")
    with pytest.raises(ConfigError, match=r"policy\.vae_slicing needs a VAE .* this DDPMPipeline has no VAE\."):
        Diffusion.start(parts(pixel_model, "ddpm", vae_slicing=True), tmp_path / "b")
