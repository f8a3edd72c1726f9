"""Noise schedules and prediction targets for training.

A sampling scheduler cannot train: `set_timesteps` shrinks its tables in place, and some have no `add_noise` at all. So
a training schedule is made from its configuration, for two kinds: variance preserving and flow matching. x0 is a clean
latent, noise a standard normal of its shape, and t a time as scheduler.timesteps counts it. A share in [0, 1] is a
position in the schedule: 0 the clean image, 1 pure noise. A schedule has the `times` (N,) of shares, the `noised`
latents (N, ...) at these times, the `target` (N, ...) that the scheduler expects, and `weights` (N,) of squared errors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from raftune.config.training import DiffusionTraining
from raftune.errors import ConfigError, ModelError

VARIANCE_PRESERVING = (
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "SASolverScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


class VariancePreserving:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, a_t the cumulative product of 1 - beta (Ho et al. 2020, eq. 4).

    The target is the noise, v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (Salimans and Ho 2022), or x0 itself.
    """

    def __init__(self, betas: torch.Tensor, prediction_type: str) -> None:
        self.prediction = prediction_type
        self.scheduler = DDPMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas.tolist(), prediction_type=prediction_type
        )

    def times(self, shares: torch.Tensor) -> torch.Tensor:
        steps = int(self.scheduler.config.num_train_timesteps)
        return (shares * steps).long().clamp(0, steps - 1)

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        noisy: torch.Tensor = self.scheduler.add_noise(x0, noise, t)
        return noisy

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if self.prediction == "v_prediction":
            velocity: torch.Tensor = self.scheduler.get_velocity(x0, noise, t)
            return velocity
        return noise if self.prediction == "epsilon" else x0

    def weights(self, t: torch.Tensor, gamma: float | None) -> torch.Tensor:
        """Min-SNR (Hang et al. 2023): the loss on x0 weighted by min(snr, gamma), put in terms of the prediction."""
        if gamma is None:
            return torch.ones(t.shape, device=t.device)
        snr: torch.Tensor = compute_snr(self.scheduler, t)
        least = snr.clamp(max=gamma)
        if self.prediction == "sample":
            return least
        return least / (snr if self.prediction == "epsilon" else snr + 1)


class FlowMatching:
    """x_t = (1 - s) x0 + s noise, the target noise - x0, and t = s times the schedule's length (Esser et al. 2024).

    s is the share after the sampler's own shift, so that training spends its levels where sampling spends its steps.
    """

    def __init__(self, steps: int, shift: float = 1.0, sampler: Any = None, mu: float | None = None) -> None:
        self.steps, self.shift, self.sampler, self.mu = steps, shift, sampler, mu

    def times(self, shares: torch.Tensor) -> torch.Tensor:
        if self.mu is None:
            return self.steps * self.shift * shares / (1 + (self.shift - 1) * shares)
        shifted: torch.Tensor = self.sampler.time_shift(self.mu, 1.0, shares)
        return self.steps * shifted

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = (t / self.steps).to(x0.device, x0.dtype).reshape(-1, *[1] * (x0.dim() - 1))
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return noise - x0

    def weights(self, t: torch.Tensor, gamma: float | None) -> torch.Tensor:
        assert gamma is None, "check_schedule_options has refused min-SNR"
        return torch.ones(t.shape, device=t.device)


Schedule = VariancePreserving | FlowMatching


def schedule_of(pipe: Any, denoiser: Any = None, latent_shape: tuple[int, int, int] | None = None) -> Schedule:
    """The training schedule that belongs to the pipeline's scheduler. Raises ModelError where none is known.

    A scheduler whose shift depends on the resolution needs the denoiser and the (C, h, w) of the run's latents.
    """
    scheduler, config = pipe.scheduler, pipe.scheduler.config
    name, steps = type(scheduler).__name__, pipe.scheduler.config.get("num_train_timesteps")
    prediction, flow_sigmas = config.get("prediction_type"), bool(config.get("use_flow_sigmas"))
    if flow_sigmas or prediction == "flow_prediction":  # a solver that follows a flow: DPM-Solver, UniPC and others
        if prediction != "flow_prediction" or not flow_sigmas:
            raise ModelError(
                f"A scheduler with use_flow_sigmas must have prediction_type flow_prediction, and the reverse; {name} "
                f"has use_flow_sigmas {flow_sigmas} and {prediction!r}."
            )
        if config.get("use_dynamic_shifting"):
            raise ModelError(f"Shifts by resolution are known for {FLOW_MATCHING[0]}; {name} has use_dynamic_shifting.")
        return FlowMatching(steps, config.get("flow_shift", 1.0))
    if name in FLOW_MATCHING:
        if config.get("invert_sigmas"):
            raise ModelError(
                f"The pipeline's scheduler must count noise upwards; {name} has invert_sigmas. Use a pipeline without "
                "it."
            )
        if not config.get("use_dynamic_shifting"):
            return FlowMatching(steps, config.shift)
        if latent_shape is None:  # enough to know that there is one
            return FlowMatching(steps)
        # mu of the sampler at this resolution: linear in the number of tokens, as the pipelines have it
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = float(least + (most - least) * (tokens(denoiser, latent_shape) - low) / (high - low))
        return FlowMatching(steps, sampler=copy.copy(scheduler), mu=mu)
    if name not in VARIANCE_PRESERVING:
        raise ModelError(
            f"The pipeline's scheduler must be one whose training loss is known; got {name}. Known are "
            f"{', '.join(sorted(VARIANCE_PRESERVING + FLOW_MATCHING))}: save the pipeline with one of them."
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"The scheduler's prediction_type must be epsilon, v_prediction or sample; {name} has {prediction!r}. "
            "Use a pipeline of one of these."
        )
    if config.get("timestep_type") == "continuous":
        raise ModelError(
            f"The pipeline's scheduler must count discrete times; {name} has timestep_type 'continuous', as EDM models "
            "have, whose loss is not known here. Use a pipeline that was trained on discrete times."
        )
    schedule = VariancePreserving(scheduler.betas, prediction)
    if prediction == "epsilon" and schedule.scheduler.alphas_cumprod[-1] == 0:
        raise ModelError(
            f"A schedule that ends in pure noise must predict v or x0; {name} has rescale_betas_zero_snr with epsilon, "
            "from which no image can be recovered at the last level. Use the pipeline's true prediction_type."
        )
    return schedule


def tokens(denoiser: Any, latent_shape: tuple[int, int, int]) -> int:
    """How many tokens a transformer gets for such a latent, whether it cuts patches itself or gets them packed."""
    channels, height, width = latent_shape
    config = denoiser.config
    return channels * height * width // int(config.in_channels * config.get("patch_size", 1) ** 2)


def check_schedule_options(schedule: Schedule, training: DiffusionTraining) -> None:
    """Raises ConfigError for an option that means nothing on this schedule."""
    if training.min_snr_gamma is not None and isinstance(schedule, FlowMatching):
        raise ConfigError(
            f"training.diffusion.min_snr_gamma must be left out for flow matching; got {training.min_snr_gamma:g}. Its "
            "levels are weighted by how often they are chosen: see training.diffusion.level_sampling."
        )


def stratified(count: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """(count, levels) numbers, each uniform in [0, 1), the j-th of a row in the j-th of as many equal parts.

    A row's levels so cover the schedule: their mean loss varies less than over independent ones, and means the same.
    """
    uniform = torch.rand(count, levels, generator=generator, dtype=torch.float64)
    return (torch.arange(levels, dtype=torch.float64) + uniform) / levels


def shares(uniform: torch.Tensor, training: DiffusionTraining, schedule: Schedule) -> torch.Tensor:
    """The positions in the schedule for uniform numbers in [0, 1), within training.noise_range.

    uniform: even over the range. logit_normal: the logistic of a standard normal (Esser et al. 2024), cut to the range.
    """
    low, high = training.noise_range
    usual = "logit_normal" if isinstance(schedule, FlowMatching) else "uniform"
    if (training.level_sampling or usual) == "uniform":
        return low + (high - low) * uniform
    edges = torch.special.ndtr(torch.logit(torch.tensor([low, high], dtype=torch.float64)))
    normal = torch.special.ndtri(edges[0] + (edges[1] - edges[0]) * uniform)
    return torch.sigmoid(normal).clamp(low, high)
