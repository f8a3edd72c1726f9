"""Forecast of image runs: denoiser forwards, memory, disk, and time where no trial is possible."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from raftune.config.policy import AdapterConfig, DiffusionPolicy
from raftune.config.run import RunConfig
from raftune.policies.diffusion.published import PUBLISHED, PublishedPipeline
from raftune.policies.footprint import (
    ADAM,
    BYTES,
    PER_SAMPLE,
    DiskForecast,
    Footprint,
    RoundAmounts,
    in_short,
    kept_models,
    takes_checkpoints,
)
from raftune.sanitize import counted, megabytes, percent

PNG = 1.6  # bytes a pixel of a photograph-like image; flat drawings take less
CHECKPOINTED = 0.2  # of the layers' outputs that learning keeps with gradient checkpointing, about
BACKWARD = 3  # learning costs so many forwards: one forward, and a backward of two
AGAIN = 4  # and so many with gradient checkpointing, which computes the outputs anew
PEAK = {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12}  # operations a second
DEVICE, SHARE = "A100", 0.4  # the device that PEAK is of, and the share of its peak that such models reach
LARGE = 100_000_000  # parameters: a denoiser beyond is not tried on a CPU
SMALL = 20_000_000  # parameters: a denoiser below draws dozens of images in seconds


@dataclass(frozen=True)
class ImageWork:
    """Of the run: images generated, forwards of the denoiser that this takes, and rows learned (each at one noise
    level:
    a forward and a backward)."""

    pictures: int
    forwards: int
    learned: int


@dataclass(frozen=True)
class ImageMemory:
    """Bytes at the two peaks: generating (denoiser and frozen parts) and training (denoiser, gradients, the optimizer's
    moments, a moving average, layers' outputs; None where these are not known)."""

    denoiser: int
    frozen: int
    trained_state: int
    outputs: int | None

    @property
    def drawing(self) -> int:
        return self.denoiser + self.frozen

    @property
    def training(self) -> int:
        return self.denoiser + self.trained_state + (self.outputs or 0)

    def describe(self) -> str:
        layers = f", layers' outputs about {megabytes(self.outputs)}" if self.outputs is not None else ""
        on_top = "" if self.outputs is not None else "layers' outputs and "
        return (
            f"generating {megabytes(self.drawing)} (denoiser {megabytes(self.denoiser)}, text encoders and VAE "
            f"{megabytes(self.frozen)}), training {megabytes(self.training)} (gradients and optimizer "
            f"{megabytes(self.trained_state)}{layers}); {on_top}reward models come on top"
        )


@dataclass(frozen=True)
class PipelineSize(Footprint):
    """A pipeline in numbers: parameters of its denoiser and those that are trained, bytes of its frozen parts, how it
    is called, the bytes of one image's latents. `basis`: where the numbers come from.

    `flops` and `outputs` are of one forward of one image; None where they are not known.
    """

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
    basis: str
    flops: float | None = None
    outputs: float | None = None

    @property
    def weight(self) -> int:
        return BYTES[self.dtype]

    @property
    def kept(self) -> int:
        """Bytes of what a round writes: its LoRA in float32, or the whole denoiser."""
        return self.trained * (self.weight if self.trained == self.parameters else BYTES["float32"])

    model_key: ClassVar[str] = "pipeline"
    memory_key: ClassVar[str] = "room"
    encodes_answers: ClassVar[bool] = False
    samples: ClassVar[str] = "images about"

    @classmethod
    def of(cls, policy: Any, start: Path, facts: Any) -> PipelineSize:
        config, frozen = policy.config, policy.frozen
        return PipelineSize(
            architecture=facts["architecture"],
            parameters=facts["parameters"],
            trained=trained_parameters(facts["denoiser"], frozen.pipe, frozen.denoiser.name, config.policy.adapter),
            dtype=facts["dtype"],
            frozen=facts["frozen_bytes"],
            device=str(policy.device),
            height=facts["height"],
            width=facts["width"],
            steps=facts["num_inference_steps"],
            forwards=forwards_of(frozen.pipe.scheduler, facts["num_inference_steps"]) * facts["forwards_per_step"],
            latents=math.prod(facts["latents_shape"]) * BYTES[facts["dtype"]],
            basis="counted on the pipeline",
        )

    @classmethod
    def published(cls, config: RunConfig) -> PipelineSize | None:
        """That of a pipeline of the hub that is not at hand; None where it is, or where nothing is known."""
        known = published(config.policy) if isinstance(config.policy, DiffusionPolicy) else None
        return None if known is None else from_published(known, config)

    @property
    def not_tried(self) -> str:
        if self.flops is not None:
            return f"{self.architecture} is not at hand: its sizes are the published ones, and nothing was fetched"
        if self.device == "cpu" and self.parameters > LARGE:
            return "a denoiser of this size is not tried on a CPU: plan where the run will be for its time"
        return ""

    @property
    def widths(self) -> tuple[int, ...]:
        return () if self.parameters < SMALL else (1, 2)

    @property
    def seconds_basis(self) -> str:
        return f"by arithmetic, on one {DEVICE} at {percent(SHARE)} of its peak; VAE and rewards come on top"

    def describe(self, family: str) -> str:
        trained = "all trained" if self.trained == self.parameters else f"{in_short(self.trained)} trained (LoRA)"
        size = f"denoiser of {in_short(self.parameters)} parameters, {trained}"
        steps = f"{counted(self.steps, 'step')}, {counted(self.forwards, 'forward')} an image"
        asked = f"{self.height} x {self.width} pixels, {steps}"
        return f"{self.architecture}, {size}, {self.dtype} on {self.device}; {asked} ({self.basis})"

    def describe_work(self, config: RunConfig, planned: RoundAmounts, tokens: float | None) -> str:
        work = self.work(config, planned)
        learned = f"at most {work.learned:,} forwards and backwards to learn"
        return f"{work.forwards:,} forwards of the denoiser to generate them, {learned}"

    def work(self, config: RunConfig, planned: RoundAmounts) -> ImageWork:
        """The amounts in the denoiser's terms; rows that are replayed are counted at their most."""
        rows = planned.rounds * learned_rows(config, planned) * config.training.diffusion.noise_levels
        return ImageWork(planned.samples, planned.samples * self.forwards, rows)

    def memory(self, config: RunConfig, longest_prompt: int = 0, rows: int = 0) -> ImageMemory:
        training = config.training
        copies = 1 + ADAM + (training.diffusion.ema_decay is not None)
        outputs = None
        if self.outputs is not None:
            batch = training.per_device_train_batch_size * training.diffusion.noise_levels
            each = self.outputs * (2 if training.bf16 else self.weight)
            outputs = int(batch * each * (CHECKPOINTED if training.gradient_checkpointing else 1))
        return ImageMemory(self.parameters * self.weight, self.frozen, self.kept * copies, outputs)

    def disk(
        self, config: RunConfig, planned: RoundAmounts, sample: float | None = None, fit: float | None = None
    ) -> DiskForecast:
        each = self.height * self.width * PNG if sample is None else sample
        copied = planned.rounds * planned.kept * (1 + config.training.replay_rounds)  # rows.parquet: what is learned
        drawn = planned.rounds * planned.drawn if config.keep_latents == "all" else 0
        checkpoint = self.kept * (1 + ADAM) if takes_checkpoints(config, planned, fit) else 0
        images = int((planned.samples + copied) * each + planned.samples * PER_SAMPLE)
        models = kept_models(config, planned.rounds) * self.kept
        return DiskForecast(models, 2 * checkpoint, images, (drawn + copied) * self.latents)

    def seconds(self, config: RunConfig, work: Any) -> dict[str, float] | None:
        """On the named device by arithmetic alone, without VAE and rewards; None where a forward is not known."""
        if self.flops is None:
            return None
        training = config.training
        learning = self.dtype if not training.bf16 else "bfloat16"
        times = AGAIN if training.gradient_checkpointing else BACKWARD
        return {
            "generating": work.forwards * self.flops / (PEAK[self.dtype] * SHARE),
            "training": work.learned * times * self.flops / (PEAK[learning] * SHARE),
        }


def forwards_of(scheduler: Any, steps: int) -> int:
    """How often the denoiser is asked: for some schedulers once more, or twice as often, than there are steps."""
    own = type(scheduler).from_config(scheduler.config)
    accepted = inspect.signature(own.set_timesteps).parameters
    own.set_timesteps(steps, **({"mu": 1.0} if own.config.get("use_dynamic_shifting") and "mu" in accepted else {}))
    return len(own.timesteps)


def trained_parameters(denoiser: str, pipe: Any, name: str, adapter: AdapterConfig | None) -> int:
    """How many weights are trained: all, or those of the adapter, counted on a denoiser without memory."""
    return count_trained(denoiser, getattr(pipe, name).config, adapter)[1]


def count_trained(denoiser: str, config: Any, adapter: AdapterConfig | None) -> tuple[int, int]:
    """Parameters of a denoiser of this class, and how many of them, or of its adapter, are trained."""
    import diffusers
    from accelerate import init_empty_weights

    from raftune.policies.diffusion.lora import attach_fresh

    with init_empty_weights():
        model = getattr(diffusers, denoiser).from_config(dict(config))
        total = sum(weight.numel() for weight in model.parameters())
        if adapter is None:
            return total, total
        model.requires_grad_(False)
        attach_fresh(model, adapter, 0)
    return total, sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def published(config: DiffusionPolicy) -> PublishedPipeline | None:
    """What is known of a pipeline of the hub that is not at hand; None where it is, or where nothing is known."""
    known = PUBLISHED.get(config.model)
    if known is None or Path(config.model).exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(config.model, "model_index.json", revision=config.revision)
    return None if isinstance(cached, str) else known


def from_published(known: PublishedPipeline, config: RunConfig) -> PipelineSize:
    """The pipeline by its published sizes, at the size and steps of this run."""
    policy, call = config.policy, config.sampling.diffusion
    assert isinstance(policy, DiffusionPolicy)
    height, width, steps = call.height or known.size, call.width or known.size, call.num_inference_steps or known.steps
    guidance = known.guidance if call.guidance_scale is None or known.guidance <= 1 else call.guidance_scale
    twice = max(guidance, float(call.pipeline_kwargs.get("true_cfg_scale", 1.0))) > 1
    left_out = {name for name, value in policy.pipeline_init_kwargs.items() if value is None}
    frozen = sum(size for part, size in known.frozen.items() if part.replace(" ", "_") not in left_out)
    total, trained = count_trained(known.denoiser, known.config, policy.adapter)
    channels, pixels = known.latents
    area = height * width / known.size**2
    return PipelineSize(
        architecture=known.pipeline,
        parameters=total,
        trained=trained,
        dtype=policy.dtype,
        frozen=frozen * BYTES[policy.dtype],
        device=DEVICE,
        height=height,
        width=width,
        steps=steps,
        forwards=(steps + known.extra_steps) * (2 if twice else 1),
        latents=channels * (height // pixels) * (width // pixels) * BYTES[policy.dtype],
        basis="estimated from published sizes; nothing was fetched",
        flops=known.flops * area,
        outputs=known.outputs * area,
    )


def learned_rows(config: RunConfig, planned: RoundAmounts) -> int:
    """Rows of a round, as often as they are learned."""
    training = config.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if training.max_steps > 0:
        return training.max_steps * per_step
    rows = float(planned.kept * (1 + min(training.replay_rounds, max(0, config.num_rounds - 1))))
    if training.reference is not None:
        rows /= 1 - training.reference.fraction
    return math.ceil(rows * training.num_train_epochs)
