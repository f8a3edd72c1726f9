"""The parity oracle accepts what every pipeline really does, and nothing that differs from it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    UNet2DModel,
)

from raftune.errors import ModelError
from raftune.policies.diffusion.parity import check_parity
from raftune.policies.diffusion.pipelines import adapter_of
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall
from raftune.policies.diffusion.pipelines.dit import DiT
from raftune.policies.diffusion.pipelines.flux import Flux
from raftune.policies.diffusion.pipelines.pixart import PixArt
from raftune.policies.diffusion.pipelines.sd3 import SD3
from raftune.policies.diffusion.pipelines.sdxl import SDXL
from raftune.policies.diffusion.pipelines.stable_diffusion import StableDiffusion
from raftune.training.quiet import quiet
from tests.pipelines import KINDS, Kind, tiny_pipeline

VARIANCE_PRESERVING = (
    *("PNDMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
)


def refusal(binding: PipelineAdapter) -> str:
    with pytest.raises(ModelError, match="will not train what it cannot verify") as caught:
        check_parity(binding)
    return str(caught.value)


def changed(model: type[Any], denoiser: Any, **changes: Any) -> Any:
    """A denoiser of the same sizes with other weights, and these options."""
    own = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return model(**{**own, **changes}).eval()


# -- what is true is accepted, exactly ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_says_exactly_what_its_pipeline_says(kind: Kind) -> None:
    assert check_parity(adapter_of(tiny_pipeline(kind))).differences == (0.0, 0.0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_a_prediction_is_of_what_the_denoiser_is_given_whatever_the_scheduler_scales(name: str) -> None:
    pipe = tiny_pipeline("sd-v")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_a_second_order_flow_scheduler_passes_the_parity_check_at_each_of_its_evaluations() -> None:
    pipe = tiny_pipeline("sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert check_parity(adapter_of(pipe)).differences == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_passes_the_parity_check_too(kind: Kind, dtype: torch.dtype) -> None:
    pipe = tiny_pipeline(kind)
    with quiet():
        pipe.to(dtype)
    proof = check_parity(adapter_of(pipe))
    assert max(proof.differences) <= proof.limit


def test_sd3_without_its_t5_passes_the_parity_check() -> None:
    pipe = tiny_pipeline("sd3")
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_sdxl_whose_vae_centres_its_latents_passes_the_parity_check() -> None:
    pipe = tiny_pipeline("sdxl")
    pipe.vae = changed(AutoencoderKL, pipe.vae, latents_mean=(0.5, -1.0, 2.0, 0.0), latents_std=(2.0, 0.5, 1.5, 3.0))
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_flux_without_guidance_embedding_passes_the_parity_check() -> None:
    pipe = tiny_pipeline("flux")
    pipe.transformer = changed(FluxTransformer2DModel, pipe.transformer, guidance_embeds=False)
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0


def test_pixart_sigma_without_a_size_passes_the_parity_check() -> None:
    alpha = tiny_pipeline("pixart")
    denoiser = changed(PixArtTransformer2DModel, alpha.transformer, use_additional_conditions=False)
    parts = {name: getattr(alpha, name) for name in ("scheduler", "vae", "text_encoder", "tokenizer")}
    sigma = PixArtSigmaPipeline(transformer=denoiser, **parts)
    sigma.set_progress_bar_config(disable=True)
    assert max(check_parity(adapter_of(sigma)).differences) == 0.0


def test_an_unconditional_model_with_a_learned_variance_or_one_channel_passes_the_parity_check() -> None:
    learned, grey = tiny_pipeline("ddpm"), tiny_pipeline("ddim")
    learned.unet = changed(UNet2DModel, learned.unet, out_channels=6)
    learned.scheduler = DDPMScheduler(variance_type="learned_range")
    grey.unet = changed(UNet2DModel, grey.unet, in_channels=1, out_channels=1)
    assert max(check_parity(adapter_of(learned)).differences) == 0.0
    assert max(check_parity(adapter_of(grey)).differences) == 0.0


def test_the_scheduler_and_the_random_state_are_as_before() -> None:
    pipe, before = tiny_pipeline("dit"), torch.get_rng_state()
    check_parity(adapter_of(pipe))
    assert not {"step", "scale_model_input"} & set(vars(pipe.scheduler))
    assert torch.equal(torch.get_rng_state(), before)


# -- what is false is refused ------------------------------------------------------------------------------------------


class WrongSign(SD3):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return -super().predict(x_t, t, conditions)


class WrongScale(PixArt):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t, t, conditions) * 1.01


class WrongTime(Flux):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t, t / 1000, conditions)


class WrongGuidance(Flux):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t, t, self.guided(conditions, 3.5))


class WrongTexts(StableDiffusion):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t, t, conditions.take([1, 0]))


class NoSize(SDXL):
    def _time_ids(self, x_t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(super()._time_ids(x_t))


class NoRatio(PixArt):
    def _size_of(self, x_t: torch.Tensor) -> dict[str, torch.Tensor | None]:
        return {**super()._size_of(x_t), "aspect_ratio": torch.ones(len(x_t), 1)}


class WrongClass(DiT):
    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t, t, Conditions({"labels": conditions.tensors["labels"] + 1}))


WRONG: list[tuple[Kind, type[PipelineAdapter]]] = [
    *[("sd3", WrongSign), ("pixart", WrongScale), ("flux", WrongTime), ("flux", WrongGuidance), ("sd", WrongTexts)],
    *[("sdxl", NoSize), ("pixart", NoRatio), ("dit", WrongClass)],
]


@pytest.mark.parametrize(("kind", "binding"), WRONG, ids=lambda one: one if isinstance(one, str) else one.__name__)
def test_a_binding_that_differs_in_one_thing_is_refused(kind: Kind, binding: type[PipelineAdapter]) -> None:
    told = refusal(binding(tiny_pipeline(kind)))
    assert f"the {type(tiny_pipeline(kind)).__name__}'s output differs from raftune's own by" in told
    assert "at step 1 of 2" in told


class TransposedPacks(Flux):
    """Cells in another order, there and back again: predictions agree, and the latents mean something else."""

    def _unpack(self, packs: torch.Tensor, height: int, width: int) -> torch.Tensor:
        right = super()._unpack(packs, height, width)
        return right.flip(-1)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return super().predict(x_t.flip(-1), t, conditions)


class RawPacks(Flux):
    def unpacked(self, latents: torch.Tensor, call: PipelineCall) -> torch.Tensor:
        return latents


class OtherLatents(StableDiffusion):
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 4, height // 8, width // 8


def test_latents_that_decode_to_another_image_are_refused() -> None:
    told = refusal(TransposedPacks(tiny_pipeline("flux")))
    assert "the latents that raftune keeps decode to other images than the FluxPipeline's, by" in told


def test_latents_left_in_packs_are_refused() -> None:
    assert "raftune's call of the FluxPipeline's denoiser failed" in refusal(RawPacks(tiny_pipeline("flux")))


def test_latents_of_another_shape_are_refused() -> None:
    told = refusal(OtherLatents(tiny_pipeline("sd")))
    assert "latents have the shape (4, 4, 8), where raftune expects (4, 1, 2)" in told


def test_a_denoiser_that_gives_nan_is_named_before_anything_is_compared() -> None:
    pipe = tiny_pipeline("sd")
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelError, match="gave NaN or infinity at step 1 in float32"):
        check_parity(adapter_of(pipe))


def test_a_pipeline_that_cannot_draw_says_what_it_said() -> None:
    pipe = tiny_pipeline("sd")
    with pytest.raises(ModelError, match=r"failed at 8 x 16 pixels with ValueError: .* does not support custom"):
        check_parity(adapter_of(pipe), {"sigmas": [1.0]})


def test_kwargs_that_change_the_denoiser_s_inputs_are_detected() -> None:
    pipe = tiny_pipeline("sd")
    pipe.unet.register_forward_pre_hook(_scaled_by_kwargs, with_kwargs=True)
    assert max(check_parity(adapter_of(pipe)).differences) == 0.0
    with pytest.raises(ModelError, match="output differs"):
        check_parity(adapter_of(pipe), {"cross_attention_kwargs": {"scale": 2.0}})


def _scaled_by_kwargs(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As an adapter that follows cross_attention_kwargs does."""
    scale = (kwargs.pop("cross_attention_kwargs", None) or {}).get("scale", 1.0)
    return (args[0] * scale, *args[1:]), kwargs
