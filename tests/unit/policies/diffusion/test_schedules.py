"""Noise, targets and weights are those of the papers, of diffusers' own schedulers, and of Gaussians in closed form."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from raftune.config.training import DiffusionTraining
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion.schedules import (
    FLOW_MATCHING,
    VARIANCE_PRESERVING,
    FlowMatching,
    Schedule,
    VariancePreserving,
    check_schedule_options,
    schedule_of,
    shares,
    stratified,
    tokens,
)
from tests.pipelines import tiny_pipeline

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Holding:
    """A pipeline as far as `schedule_of` looks at it."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler


def made(name: str, **options: Any) -> Any:
    return getattr(diffusers, name)(**options)


def preserving(prediction: str = "epsilon", steps: int = 1000) -> VariancePreserving:
    return VariancePreserving(torch.linspace(0.00085, 0.012, steps), prediction)


def random_latents(seed: int = 0, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, 3, 3, generator=generator), torch.randn(rows, 4, 3, 3, generator=generator)


# -- formulas --------------------------------------------------------------------------------------------------------


def test_noise_and_targets_are_the_formulas_of_the_papers() -> None:
    x0, noise = random_latents()
    t = torch.tensor([0, 1, 500, 998, 999])
    kept = np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))[t.numpy()]
    a, b = (torch.from_numpy(np.sqrt(part)).float().reshape(-1, 1, 1, 1) for part in (kept, 1 - kept))
    wanted = {"epsilon": noise, "v_prediction": a * noise - b * x0, "sample": x0}
    for prediction in PREDICTIONS:
        schedule = preserving(prediction)
        torch.testing.assert_close(schedule.noised(x0, noise, t), a * x0 + b * noise, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(schedule.target(x0, noise, t), wanted[prediction], atol=1e-5, rtol=1e-5)


def test_flow_matching_goes_straight_from_the_image_to_the_noise() -> None:
    x0, noise = random_latents()
    schedule = FlowMatching(1000)
    t = torch.tensor([0.0, 250.0, 500.0, 999.0, 1000.0])
    sigma = (t / 1000).reshape(-1, 1, 1, 1)
    noisy = schedule.noised(x0, noise, t)
    torch.testing.assert_close(noisy, x0 + sigma * (noise - x0))
    torch.testing.assert_close(noisy - sigma * schedule.target(x0, noise, t), x0)


def test_one_step_of_flux_s_scheduler_along_the_target_is_the_image() -> None:
    scheduler = made("FlowMatchEulerDiscreteScheduler", shift=3.0)
    x0, noise = random_latents(rows=1)
    schedule = schedule_of(Holding(scheduler))
    scheduler.set_timesteps(4)
    t = scheduler.timesteps[2:3]
    noisy = schedule.noised(x0, noise, t)
    torch.testing.assert_close(noisy, scheduler.scale_noise(x0, t, noise))
    scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[2:3], scheduler.sigmas[[2, 4]]
    torch.testing.assert_close(scheduler.step(schedule.target(x0, noise, t), t[0], noisy).prev_sample, x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_of_ddim_along_the_target_is_the_image(prediction: str) -> None:
    scheduler = made("DDIMScheduler", prediction_type=prediction, clip_sample=False)
    schedule = schedule_of(Holding(scheduler))
    x0, noise = random_latents(rows=1)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[4:5]
    said = schedule.target(x0, noise, t)
    found = scheduler.step(said, t[0], schedule.noised(x0, noise, t)).pred_original_sample
    torch.testing.assert_close(found, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_is_one_weighting_of_the_image_s_error_whatever_is_predicted(prediction: str, gamma: float) -> None:
    """The error of a prediction that stands for a wrong x0, weighted, is min(snr, gamma) times that x0's error."""
    schedule = preserving(prediction)
    t = torch.tensor([1, 200, 500, 800, 998])
    (x0, noise), (wrong, _) = random_latents(1), random_latents(2)
    a = schedule.scheduler.alphas_cumprod[t].sqrt().reshape(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    implied = (schedule.noised(x0, noise, t) - a * wrong) / b  # the noise that the wrong image stands for
    error = (schedule.target(wrong, implied, t) - schedule.target(x0, noise, t)).square().flatten(1).sum(1)
    wanted = compute_snr(schedule.scheduler, t).clamp(max=gamma) * (wrong - x0).square().flatten(1).sum(1)
    torch.testing.assert_close(schedule.weights(t, gamma) * error, wanted, rtol=1e-3, atol=1e-4)


def test_without_a_gamma_every_level_counts_the_same() -> None:
    t = torch.tensor([0, 999])
    assert preserving().weights(t, None).tolist() == FlowMatching(1000).weights(t, None).tolist() == [1, 1]


def test_at_zero_terminal_snr_v_and_x0_weigh_nothing_and_nothing_is_nan() -> None:
    for prediction in ("v_prediction", "sample"):
        scheduler = made("DDIMScheduler", prediction_type=prediction, rescale_betas_zero_snr=True)
        weights = schedule_of(Holding(scheduler)).weights(torch.tensor([0, 500, 999]), 5.0)
        assert weights[-1] == 0
        assert torch.isfinite(weights).all()


# -- closed forms ----------------------------------------------------------------------------------------------------


def least_error(schedule: Schedule, share: float, mean: float, spread: float) -> tuple[float, float]:
    """Of x0 ~ N(mean, spread^2), by least squares over 200,000 samples: the best error, and the x0 that is said of
    0.
    """
    generator = torch.Generator().manual_seed(3)
    x0 = mean + spread * torch.randn(200_000, 1, generator=generator)
    noise = torch.randn(200_000, 1, generator=generator)
    t = schedule.times(torch.full((200_000,), share))
    x, y = (part[:, 0].double() for part in (schedule.noised(x0, noise, t), schedule.target(x0, noise, t)))
    design = torch.stack([x, torch.ones_like(x)], 1)
    fitted = design @ torch.linalg.lstsq(design, y[:, None]).solution
    return float((fitted[:, 0] - y).square().mean()), float(x.mean())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", [*PREDICTIONS, "flow"])
def test_on_gaussian_pixels_the_least_loss_is_the_conditional_variance(kind: str, share: float) -> None:
    """Var(target | x_t) of jointly normal ones. A variance estimated from 200,000 samples errs by 2 % at 6 sigma."""
    mean, spread = 0.7, 0.4
    schedule: Schedule = FlowMatching(1000, 2.0) if kind == "flow" else preserving(kind)
    if isinstance(schedule, FlowMatching):
        b = 2 * share / (1 + share)
        a, (of_x0, of_noise) = 1 - b, (-1.0, 1.0)
    else:
        kept = float(schedule.scheduler.alphas_cumprod[int(share * 1000)])
        a, b = math.sqrt(kept), math.sqrt(1 - kept)
        of_x0, of_noise = {"epsilon": (0.0, 1.0), "v_prediction": (-b, a), "sample": (1.0, 0.0)}[kind]
    variance = of_x0**2 * spread**2 + of_noise**2
    covariance = a * of_x0 * spread**2 + b * of_noise
    wanted = variance - covariance**2 / (a**2 * spread**2 + b**2)
    found, centre = least_error(schedule, share, mean, spread)
    assert found == pytest.approx(wanted, rel=0.02)
    assert centre == pytest.approx(a * mean, abs=0.015)


# -- which schedulers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_the_table_is_the_sampler_s_own_and_sampling_does_not_shrink_it(name: str) -> None:
    scheduler = made(name, beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear", num_train_timesteps=500)
    before = schedule_of(Holding(scheduler))
    scheduler.set_timesteps(4)
    after = schedule_of(Holding(scheduler))
    assert isinstance(before, VariancePreserving)
    assert isinstance(after, VariancePreserving)
    torch.testing.assert_close(before.scheduler.alphas_cumprod, scheduler.alphas_cumprod)
    torch.testing.assert_close(after.scheduler.alphas_cumprod, before.scheduler.alphas_cumprod)
    assert len(after.scheduler.alphas_cumprod) == 500


def test_noise_and_velocity_are_the_sampler_s_where_it_has_them() -> None:
    x0, noise = random_latents()
    t = torch.tensor([0, 10, 400, 800, 999])
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler"):
        scheduler = made(name, prediction_type="v_prediction")
        schedule = schedule_of(Holding(scheduler))
        torch.testing.assert_close(schedule.noised(x0, noise, t), scheduler.add_noise(x0, noise, t))
        if hasattr(scheduler, "get_velocity"):
            torch.testing.assert_close(schedule.target(x0, noise, t), scheduler.get_velocity(x0, noise, t))


@pytest.mark.parametrize("name", FLOW_MATCHING)
def test_times_of_a_flow_are_the_sampler_s_own_shifted_ones(name: str) -> None:
    scheduler = made(name, shift=3.0)
    schedule = schedule_of(Holding(scheduler))
    even = torch.linspace(1, 1000, 1000).flip(0) / 1000
    torch.testing.assert_close(schedule.times(even), scheduler.timesteps)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_with_flow_sigmas_has_the_flow_loss(name: str) -> None:
    scheduler = made(name, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    schedule = schedule_of(Holding(scheduler))
    assert isinstance(schedule, FlowMatching)
    assert schedule.shift == 3.0
    with pytest.raises(ModelError, match="prediction_type flow_prediction, and the reverse"):
        schedule_of(Holding(made(name, use_flow_sigmas=True)))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_a_shift_that_depends_on_the_resolution_is_the_pipeline_s_at_that_resolution(kind: Any) -> None:
    pipe = tiny_pipeline(kind)
    shape = (4, 12, 8)
    assert tokens(pipe.transformer, shape) == 12 * 8 // 4
    scheduler = made("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    schedule = schedule_of(Holding(scheduler), pipe.transformer, shape)
    even = torch.linspace(1000, 1, 7) / 1000
    scheduler.set_timesteps(sigmas=even.tolist(), mu=calculate_shift(12 * 8 // 4))
    torch.testing.assert_close(schedule.times(even), scheduler.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler"]
)
def test_a_scheduler_without_a_loss_here_is_refused_by_name_with_those_that_have_one(name: str) -> None:
    with pytest.raises(ModelError, match=f"got {name}. Known are DDIM.*FlowMatchEuler"):
        schedule_of(Holding(made(name)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "must predict v or x0; DDIMScheduler"),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, "must predict v or x0; EulerDiscrete"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "discrete times",
        ),
        (
            "DDIMScheduler",
            {"prediction_type": "flow"},
            "must be epsilon, v_prediction or sample; DDIMScheduler has 'fl",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "must count noise upwards"),
    ],
)
def test_a_scheduler_that_would_train_to_nonsense_is_refused(name: str, options: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        schedule_of(Holding(made(name, **options)))


def test_min_snr_on_a_flow_is_refused_as_configuration() -> None:
    with pytest.raises(ConfigError, match=r"min_snr_gamma must be left out for flow matching; got 5"):
        check_schedule_options(FlowMatching(1000), DiffusionTraining(min_snr_gamma=5))
    check_schedule_options(preserving(), DiffusionTraining(min_snr_gamma=5))
    check_schedule_options(FlowMatching(1000), DiffusionTraining())


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The Kolmogorov-Smirnov distance of two samples, over the bound that equal laws pass once in a million."""
    both = torch.cat([first, second]).double()
    below = [torch.searchsorted(one.double().sort().values, both, right=True) / len(one) for one in (first, second)]
    bound = math.sqrt(-math.log(1e-6 / 2) / 2 * (len(first) + len(second)) / (len(first) * len(second)))
    return float((below[0] - below[1]).abs().max()) / bound


# -- levels ----------------------------------------------------------------------------------------------------------


def test_a_row_s_levels_fall_into_equal_parts_and_each_is_uniform() -> None:
    found = stratified(4000, 4, torch.Generator().manual_seed(0))
    assert ((found * 4).long() == torch.arange(4)).all()
    assert apart(found.flatten(), torch.linspace(0, 1, 100_000)) < 1


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.5), (0.9, 1.0)])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_levels_stay_within_their_range_and_follow_the_named_law(sampling: Any, low: float, high: float) -> None:
    config = DiffusionTraining(noise_range=(low, high), level_sampling=sampling)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = shares(uniform, config, preserving())
    assert found.min() >= low
    assert found.max() <= high
    if sampling == "uniform":
        wanted = low + (high - low) * torch.rand(20_000, generator=torch.Generator().manual_seed(2))
    else:
        generator = torch.Generator().manual_seed(2)
        every = compute_density_for_timestep_sampling("logit_normal", 400_000, 0.0, 1.0, generator=generator)
        wanted = every[(every >= low) & (every <= high)]
    assert apart(found, wanted) < 1


def test_the_usual_law_is_logit_normal_for_a_flow_and_uniform_for_the_others() -> None:
    quarter = torch.tensor([0.25], dtype=torch.float64)
    assert shares(quarter, DiffusionTraining(), preserving()).item() == 0.25
    wanted = torch.sigmoid(torch.special.ndtri(quarter))
    torch.testing.assert_close(shares(quarter, DiffusionTraining(), FlowMatching(1000)), wanted)


def test_the_whole_schedule_is_reached_and_no_time_is_outside_it() -> None:
    schedule = preserving(steps=10)
    assert schedule.times(torch.linspace(0, 1, 1001)).unique().tolist() == list(range(10))
    assert FlowMatching(1000, 3.0).times(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1000.0]
