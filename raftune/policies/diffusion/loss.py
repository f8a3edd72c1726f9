"""The denoising loss of a batch: noise levels, noise, and weights.

Randomness is a function of (training seed, step, row): a resumed training uses the same noise, and so does one that had
to halve its micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from raftune.config.training import DiffusionTraining
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter
from raftune.policies.diffusion.schedules import Schedule, shares, stratified
from raftune.records import derive_seed
from raftune.training.fit import Batch


class StepCounter(TrainerCallback):  # type: ignore[misc]
    """Knows the optimizer step that is being made: the same for all its micro-batches, and after a resume."""

    step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


@dataclass(frozen=True)
class NoiseDraws:
    """What is random about N rows at L levels each: (N, L) shares, (N, L) prompts left out, (N, L, C, h, w) noise."""

    shares: torch.Tensor
    dropped: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class DenoisingLoss:
    """What a denoising loss is made of. The rows of `conditions` are those of the distinct prompts, and of no prompt.

    Whose loss it is: the denoiser's in the binding's pipeline.
    """

    binding: PipelineAdapter
    schedule: Schedule
    config: DiffusionTraining
    conditions: Conditions
    seed: int
    clock: StepCounter

    def draws(self, rows: Sequence[int], shape: Sequence[int]) -> NoiseDraws:
        """The samples of these rows in the clock's step; latents are of this (C, h, w)."""
        every = [self._draws(row, tuple(shape)) for row in rows]
        return NoiseDraws(*(torch.stack([one[i] for one in every]) for i in range(3)))

    def _draws(self, row: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(derive_seed(self.seed, "noise", self.clock.step, row))
        levels = self.config.noise_levels
        uniform = stratified(1, levels, generator)[0]
        dropped = torch.rand(levels, generator=generator) < self.config.condition_dropout
        noise = torch.randn((levels, *shape), generator=generator)
        return shares(uniform, self.config, self.schedule), dropped, noise

    def over(self, binding: PipelineAdapter) -> DenoisingLoss:
        """The same loss of another denoiser."""
        return replace(self, binding=binding)

    def terms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The squared error of each row at each of its noise levels, over the elements of its latents; its share in the
        loss; and the weight of all."""
        x0, coefficients = batch["x0"], batch["coefficients"]
        draws = self.draws(batch["rows"].tolist(), x0.shape[1:])
        levels = draws.noise.shape[1]
        none = len(self.conditions) - 1
        asked = torch.where(draws.dropped, none, batch["prompts"].cpu()[:, None]).flatten()
        t = self.schedule.times(draws.shares.flatten()).to(x0.device)
        errors = self.errors(x0.repeat_interleave(levels, 0), draws.noise.flatten(0, 1), t, asked)
        weights = self.schedule.weights(t, self.config.min_snr_gamma)
        shares = coefficients.repeat_interleave(levels) / levels
        return weights * errors, shares, coefficients.sum() * x0[0].numel()

    def errors(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """(N,) the squared error of each row, summed over the latent's elements; `asked` are rows of conditions."""
        noise = noise.to(x0.device, x0.dtype)
        said = self.predict(self.schedule.noised(x0, noise, t), t, asked)
        return (said - self.schedule.target(x0, noise, t)).square().flatten(1).sum(1)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) in float32, of a denoiser of whatever type."""
        conditions = self.conditions.take(asked).to(x_t.device)
        return self.binding.predict(x_t.to(self.binding.denoiser.dtype), t, conditions).float()
