"""Parity check: compares our denoiser call with the pipeline's own before training.

The unchanged pipeline runs at guidance 1 while its scheduler's calls are recorded: the denoiser's input and output at
each step. `predict`, the adapter's call of the denoiser, must give the same output for the same input. This finds
errors of sign, scale, packing, time or conditions, and pipelines whose code has changed. An image is also generated in
a batch and alone: it must depend on its own seed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch

from raftune.errors import ConfigError, ModelError, RaftuneError
from raftune.policies.diffusion.pipelines.base import (
    PipelineAdapter,
    PipelineCall,
    SampledImages,
    SchedulerStep,
    watched,
)
from raftune.sanitize import one_line
from raftune.training.quiet import quiet

STEPS = 2
SEVERAL = 4  # steps until noise that was added on the way shows in the result
CELLS = 16  # of the latents' longer side, at most
# Shares of the largest number that rounding may change, by dtype, and how many times as much over several steps.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
GROWN = 10


@dataclass(frozen=True)
class ParityResult:
    """For each step the largest difference between the two as a share of the largest number; and its limit."""

    differences: tuple[float, ...]
    limit: float


def check_parity(adapter: PipelineAdapter, kwargs: Mapping[str, Any] | None = None) -> ParityResult:
    """Raises ModelError where the adapter's prediction is not what the pipeline's scheduler gets.

    Two images of at most 16 x 8 latent cells are generated in two steps, with these pipeline_kwargs, and the denoiser
    is called again on its inputs; then two images and one image in four steps. Needs the text encoders.
    """
    with torch.no_grad(), quiet():
        trial = Trial(adapter, kwargs or {})
        images, steps = trial.generate()
        limit = limit_of(steps[0].output)
        differences = tuple(map(trial.difference, steps))
        for step, difference in zip(steps, differences, strict=True):
            if not difference <= limit:
                raise mismatch(
                    f"at step {step.index + 1} of {len(steps)} (t = {step.time.item():g}), the {trial.name}'s output "
                    f"differs from raftune's own by {difference:.3g} of its size ({limit:g} at most)",
                )
        trial.check_latents(images)
        trial.compare_seeds()
    return ParityResult(differences, limit)


def check_seeds(adapter: PipelineAdapter, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raises ModelError where an image does not depend on its own seed alone; for runs that train nothing."""
    with torch.no_grad(), quiet():
        Trial(adapter, kwargs or {}).compare_seeds()


class Trial:
    """An adapter, its cheapest call, and the conditions of two prompts that differ, so that a mix-up of rows shows."""

    def __init__(self, adapter: PipelineAdapter, kwargs: Mapping[str, Any]) -> None:
        self.adapter, self.call, self.name = adapter, smallest_call(adapter, kwargs), type(adapter.pipe).__name__
        prompts = ("red", "a cat") if adapter.takes == "text" else (0, 1)
        with failing_as(
            lambda cause: ModelError(
                f"policy.model must read prompts; this {self.name}'s text encoders failed with {cause}. Look at its "
                "tokenizers (a tokenizer_config.json must say model_max_length), and whether the pipeline reads "
                "prompts outside raftune."
            )
        ):
            conditions = adapter.encode(prompts).to(adapter.denoiser.device)
            self.conditions = adapter.guided(conditions, self.call.guidance_scale)

    def generate(
        self, seeds: Sequence[int] = (0, 1), num_inference_steps: int | None = None
    ) -> tuple[SampledImages, list[SchedulerStep]]:
        """Images of these seeds, each of the prompt of that number, and the scheduler's steps."""
        call = replace(self.call, num_inference_steps=num_inference_steps or self.call.num_inference_steps)
        steps: list[SchedulerStep] = []
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with (
            failing_as(
                lambda cause: ModelError(
                    f"policy.model must generate; this {self.name} failed at {call.height} x {call.width} pixels with "
                    f"{cause}. Look at sampling.diffusion.pipeline_kwargs, and whether the pipeline generates outside "
                    "raftune."
                )
            ),
            watched(self.adapter.pipe.scheduler, steps.append),
        ):
            images = self.adapter.sample(self.conditions.take(seeds), None, generators, call)
        return images, steps

    def difference(self, step: SchedulerStep) -> float:
        """The largest difference in one step, as a share of the largest number; infinite where shapes differ."""
        adapter, call = self.adapter, self.call
        x_t, expected = adapter.unpacked(step.model_input, call), adapter.unpacked(step.output, call)
        expected = expected[:, : x_t.shape[1]]  # a learned variance may follow, which no loss here reads
        if not bool(torch.isfinite(expected).all()):
            raise ModelError(
                f"policy.model must give finite numbers; the {self.name}'s denoiser gave NaN or infinity at step "
                f"{step.index + 1} in {str(expected.dtype).removeprefix('torch.')}. Its weights are damaged, or its "
                "numbers leave that range: write policy.dtype: bfloat16 or float32."
            )
        with failing_as(lambda cause: mismatch(f"raftune's call of the {self.name}'s denoiser failed with {cause}")):
            predicted = adapter.predict(x_t, step.time.to(x_t.device).expand(len(x_t)), self.conditions)
        return distance(predicted, expected) if predicted.shape == expected.shape else float("inf")

    def check_latents(self, images: SampledImages) -> None:
        """Raises ModelError where the latents that are kept are not those of the images."""
        adapter, x0 = self.adapter, images.x0
        shape, expected = tuple(x0.shape[1:]), adapter.latent_shape(self.call.height, self.call.width)
        if shape != expected:
            raise mismatch(f"the {self.name}'s latents have the shape {shape}, where raftune expects {expected}")
        if not all(images.finite) or adapter.overflows:
            return
        encoded = tuple(adapter.to_latents(images.images, torch.Generator("cpu").manual_seed(0)).shape)
        if encoded != tuple(x0.shape):
            raise mismatch(
                f"an image becomes latents of the shape {encoded[1:]}, where the {self.name}'s own have {shape}"
            )
        decoded = adapter.to_pixels(x0).float().cpu().permute(0, 2, 3, 1).numpy() * 255
        levels = 0.0
        for pixels, image, flagged in zip(decoded, images.images, images.flagged, strict=True):
            if not flagged:  # a flagged image is painted over
                levels = max(levels, float(np.abs(np.asarray(image, dtype=np.float32) - pixels).max()))
        if levels > (2 if x0.dtype == torch.float32 else 16):
            raise mismatch(
                f"the latents that raftune keeps decode to other images than the {self.name}'s, by {levels:.0f} of "
                f"255, through its {type(getattr(adapter.pipe, 'vae', None)).__name__}"
            )

    def compare_seeds(self) -> None:
        """Raises ModelError where the second image differs once it is generated alone: its noise was not its seed's."""
        both, _ = self.generate(num_inference_steps=SEVERAL)
        alone, _ = self.generate((1,), SEVERAL)
        if not all((*both.finite, *alone.finite)):
            return
        differs = distance(alone.x0, both.x0[1:])
        if differs > GROWN * limit_of(alone.x0):
            raise ModelError(
                f"An image must come of its own seed; generated again with the same seed, one of the {self.name}'s "
                f"differs by {differs:.3g} of its size: its {type(self.adapter.pipe.scheduler).__name__} samples noise "
                "that no seed of ours reaches. Save the pipeline with a scheduler that adds none while sampling, such "
                "as DDIMScheduler or DPMSolverMultistepScheduler (of a flow: FlowMatchEulerDiscreteScheduler)."
            )


def smallest_call(adapter: PipelineAdapter, kwargs: Mapping[str, Any]) -> PipelineCall:
    """The cheapest call: two steps, unguided, and images half as high as they are wide.

    A pipeline with one size alone generates at that size, and PNDM with its Runge-Kutta start breaks below four steps.
    """
    try:
        height, width = adapter.default_size()
    except ConfigError:
        height = width = CELLS * adapter.factor
    if not adapter.fixed_size:
        width = -(-min(width, CELLS * adapter.factor) // adapter.multiple) * adapter.multiple
        height = -(-min(height, width // 2) // adapter.multiple) * adapter.multiple
    steps = STEPS if adapter.pipe.scheduler.config.get("skip_prk_steps", True) else 4
    return PipelineCall(height, width, steps, 1.0, kwargs)


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest expected number."""
    peak = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.float() - expected.float()).abs().max() / peak.float())


def limit_of(like: torch.Tensor) -> float:
    return TOLERANCES.get(like.dtype, min(TOLERANCES.values()))


@contextmanager
def failing_as(error_of: Callable[[str], ModelError]) -> Iterator[None]:
    """Turns an error of diffusers into the one of its cause; raftune's own and a full memory pass through."""
    try:
        yield
    except (RaftuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise error_of(f"{type(error).__name__}: {one_line(str(error)).rstrip('.')}") from error


def mismatch(difference: str) -> ModelError:
    return ModelError(
        f"policy.model must be a pipeline that raftune can verify: {difference}. raftune will not train what it cannot "
        "verify. Leave out sampling.diffusion.pipeline_kwargs that change the denoiser's inputs, use the "
        "pipeline's own class and parts unchanged, or another version of diffusers (this is "
        f"{diffusers.__version__})."
    )
