"""Memory and disk of image runs, and how often their denoiser is called."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from raftune.config.policy import AdapterConfig
from raftune.config.run import RunConfig
from raftune.policies.footprint import ADAM, BYTES, PER_SAMPLE, Footprint, RoundAmounts, in_short, rows_of_round
from raftune.sanitize import counted, megabytes

PNG = 1.6  # bytes per pixel of a photograph; flat drawings take less
LARGE = 100_000_000  # parameters: the probe skips a larger denoiser on a CPU


@dataclass(frozen=True)
class ImageWork:
    """Of the run: images generated, denoiser forwards for them, and trained rows (a row at each noise level counts)."""

    pictures: int
    forwards: int
    learned: int


@dataclass(frozen=True)
class ImageMemory:
    """Bytes without activations: denoiser, frozen parts, and gradients with optimizer moments and moving average."""

    denoiser: int
    frozen: int
    trained_state: int

    def describe(self) -> str:
        return (
            f"generating {megabytes(self.denoiser + self.frozen)} (denoiser {megabytes(self.denoiser)}, text encoders "
            f"and VAE {megabytes(self.frozen)}), training {megabytes(self.denoiser + self.trained_state)} (gradients "
            f"and optimizer {megabytes(self.trained_state)}); layers' outputs and reward models come on top"
        )


@dataclass(frozen=True)
class PipelineSize(Footprint):
    """A pipeline in numbers: parameters of its denoiser, those that are trained, bytes of its frozen parts, its call,
    and the bytes of one image's latents."""

    architecture: str
    parameters: int
    trained: int
    dtype: str
    frozen: int
    device: str
    height: int
    width: int
    steps: int
    forwards: int  # of the denoiser, for one image
    latents: int

    model_key: ClassVar[str] = "pipeline"
    memory_key: ClassVar[str] = "room"
    encodes_answers: ClassVar[bool] = False
    samples: ClassVar[str] = "images about"

    @classmethod
    def of(cls, policy: Any, start: Path, facts: Any) -> PipelineSize:
        config, frozen, call = policy.config.policy, policy.frozen, policy.call
        trained = facts["parameters"]
        if config.adapter is not None:
            trained = trained_parameters(frozen.denoiser.kind, policy.blank.denoiser.config, config.adapter)
        return PipelineSize(
            architecture=facts["architecture"],
            parameters=facts["parameters"],
            trained=trained,
            dtype=config.dtype,
            frozen=facts["frozen_bytes"],
            device=str(policy.device),
            height=call.height,
            width=call.width,
            steps=call.num_inference_steps,
            forwards=forwards_of(frozen.pipe.scheduler, call.num_inference_steps) * facts["forwards_per_step"],
            latents=math.prod(facts["latents_shape"]) * BYTES[config.dtype],
        )

    @property
    def held(self) -> int:
        return self.parameters * BYTES[self.dtype]

    @property
    def saved(self) -> int:
        """Bytes of what a round writes: its LoRA in float32, or the whole denoiser."""
        return self.trained * BYTES[self.dtype if self.trained == self.parameters else "float32"]

    @property
    def not_tried(self) -> str:
        if self.device == "cpu" and self.parameters > LARGE:
            return "a denoiser of this size is not tried on a CPU: plan where the run will be for its time"
        return ""

    def describe(self, family: str) -> str:
        trained = "all trained" if self.trained == self.parameters else f"{in_short(self.trained)} trained (LoRA)"
        return (
            f"{self.architecture}, denoiser of {in_short(self.parameters)} parameters, {trained}, {self.dtype} on "
            f"{self.device}; {self.height} x {self.width} pixels, {counted(self.steps, 'step')}, "
            f"{counted(self.forwards, 'forward')} an image"
        )

    def describe_work(self, config: RunConfig, planned: RoundAmounts, tokens: float | None) -> str:
        work = self.work(config, planned)
        return (
            f"{work.forwards:,} forwards of the denoiser to generate them, at most {work.learned:,} forwards and "
            "backwards to learn"
        )

    def work(self, config: RunConfig, planned: RoundAmounts) -> ImageWork:
        training = config.training
        if training.max_steps > 0:
            rows = training.max_steps * training.per_device_train_batch_size * training.gradient_accumulation_steps
        else:
            rows = math.ceil(rows_of_round(config, planned.kept) * training.num_train_epochs)
        learned = planned.rounds * rows * training.diffusion.noise_levels
        return ImageWork(planned.samples, planned.samples * self.forwards, learned)

    def memory(self, config: RunConfig, longest_prompt: int = 0, rows: int = 0) -> ImageMemory:
        copies = 1 + ADAM + (config.training.diffusion.ema_decay is not None)
        return ImageMemory(self.held, self.frozen, self.saved * copies)

    def sample_bytes(self, config: RunConfig, planned: RoundAmounts, sample: float | None) -> tuple[int, int]:
        each = self.height * self.width * PNG if sample is None else sample
        copied = planned.rounds * planned.kept * (1 + config.training.replay_rounds)  # rows.parquet of each round
        latents = copied + (planned.rounds * planned.generated if config.keep_latents == "all" else 0)
        return int((planned.samples + copied) * each + planned.samples * PER_SAMPLE), latents * self.latents


def forwards_of(scheduler: Any, steps: int) -> int:
    """Denoiser calls for one image without guidance: some schedulers take one more than there are steps, or twice."""
    scheduler = type(scheduler).from_config(scheduler.config)
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    dynamic = scheduler.config.get("use_dynamic_shifting") and "mu" in accepted
    scheduler.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
    return len(scheduler.timesteps)


def trained_parameters(denoiser: str, config: Any, adapter: AdapterConfig) -> int:
    """Weights of the adapter on a denoiser of this class, counted without memory for them."""
    import diffusers
    from accelerate import init_empty_weights

    from raftune.policies.diffusion.lora import attach_fresh

    with init_empty_weights():
        model = getattr(diffusers, denoiser).from_config(dict(config))
        model.requires_grad_(False)
        attach_fresh(model, adapter, 0)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
