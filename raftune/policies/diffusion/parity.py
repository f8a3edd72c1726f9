"""Parity check: compares our denoiser call with the pipeline's own before training.

The unchanged pipeline runs at guidance 1 while its scheduler's calls are recorded: the denoiser's input and output at
each step. `predict`, the adapter's call of the denoiser, must give the same output for the same input. This finds
errors of sign, scale, packing, time or conditions, and pipelines whose code has changed. An image is also generated in
a batch and alone: it must depend on its own seed only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch

from raftune.errors import ConfigError, ModelError, RaftuneError
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, SampledImages
from raftune.policies.diffusion.scheduler_trace import SchedulerStep, watched
from raftune.sanitize import one_line
from raftune.training.quiet import quiet

STEPS = 2
SEVERAL = 4  # steps until noise that was added on the way shows in what comes out
CELLS = 16  # of the latents' longer side, at most
TEXTS = ("red", "a cat")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # shares of the largest number
GROWN = 10  # times as much may come of the rounding of several steps in another batch


@dataclass(frozen=True)
class ParityResult:
    """Of each step the largest difference between the two, as a share of the largest number, and its dtype's limit."""

    differences: tuple[float, ...]
    limit: float


def refuse_unproven(binding: PipelineAdapter, kwargs: Mapping[str, Any] | None = None) -> ParityResult:
    """Raises ModelError where the binding's prediction is not what the pipeline's scheduler is told.

    Two images of at most 16 x 8 latent cells are generated in two steps, with these pipeline_kwargs, and the denoiser
    is asked again, then two and one in four steps: as much as twenty of its calls at that size, and a few decodings.
    Needs the text encoders.
    """
    call = smallest_call(binding, kwargs or {})
    with torch.no_grad(), quiet():
        conditions = _asked(binding, call)
        pictures, steps = _drawn(binding, conditions, call)
        limit = _limit(steps[0].output)
        found = tuple(_difference(binding, step, conditions, call) for step in steps)
        for step, difference in zip(steps, found, strict=True):
            if not difference <= limit:
                raise _refusal(
                    f"at step {step.index + 1} of {len(steps)} (t = {step.time.item():g}), {_whose(binding)} "
                    f"output differs from raftune's own by {difference:.3g} of its size ({limit:g} at most)",
                )
        _refuse_other_latents(binding, pictures, steps[-1], call)
        _refuse_noise_of_no_seed(binding, conditions, call)
    return ParityResult(found, limit)


def refuse_unseeded(binding: PipelineAdapter, kwargs: Mapping[str, Any] | None = None) -> None:
    """Raises ModelError where an image does not come of its own seed alone; for runs that generate and train
    nothing.
    """
    call = smallest_call(binding, kwargs or {})
    with torch.no_grad(), quiet():
        _refuse_noise_of_no_seed(binding, _asked(binding, call), call)


def smallest_call(binding: PipelineAdapter, kwargs: Mapping[str, Any]) -> PipelineCall:
    """The least that shows everything: two steps, unguided, and images half as high as they are wide.

    A pipeline that has one size alone draws at that size, and PNDM with its Runge-Kutta start breaks below four steps.
    """
    height, width = _usual_size(binding)
    if not _fixed(binding, height, width):
        width = _up(min(width, CELLS * binding.factor), binding.multiple)
        height = _up(min(height, width // 2), binding.multiple)
    steps = STEPS if binding.pipe.scheduler.config.get("skip_prk_steps", True) else 4
    return PipelineCall(height, width, steps, 1.0, kwargs)


def _usual_size(binding: PipelineAdapter) -> tuple[int, int]:
    try:
        return binding.default_size()
    except ConfigError:  # it has none, and is told one
        return CELLS * binding.factor, CELLS * binding.factor


def _fixed(binding: PipelineAdapter, height: int, width: int) -> bool:
    """Whether it draws at its own size alone."""
    try:
        binding.refuse_size(height, width + binding.multiple)
    except RaftuneError:
        return True
    return False


def _up(pixels: int, multiple: int) -> int:
    return -(-pixels // multiple) * multiple


def _prompts(binding: PipelineAdapter) -> Sequence[Any]:
    """Two that differ, so that a row that is told another's conditions shows."""
    return TEXTS if binding.takes == "text" else (0, 1)


def _asked(binding: PipelineAdapter, call: PipelineCall) -> Conditions:
    """What two prompts tell the denoiser, on its device. Raises ModelError where they cannot be read."""
    try:
        asked = binding.encode(_prompts(binding)).to(binding.denoiser.device)
    except (RaftuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"policy.model must read prompts; this {type(binding.pipe).__name__}'s text encoders failed with "
            f"{_said(error)}. Look at its tokenizers (a tokenizer_config.json must say model_max_length), and whether "
            "the pipeline reads prompts outside raftune."
        ) from error
    return binding.guided(asked, call.guidance_scale)


def _drawn(
    binding: PipelineAdapter, conditions: Conditions, call: PipelineCall, seeds: Sequence[int] = (0, 1)
) -> tuple[SampledImages, list[SchedulerStep]]:
    """The images, and what passed through the scheduler. Raises ModelError where the pipeline cannot draw."""
    steps: list[SchedulerStep] = []
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    try:
        with watched(binding.pipe.scheduler, steps.append):
            pictures = binding.sample(conditions, None, generators, call)
    except (RaftuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"policy.model must generate; this {type(binding.pipe).__name__} failed at {call.height} x {call.width} "
            f"pixels "
            f"with {_said(error)}. Look at sampling.diffusion.pipeline_kwargs, and whether the "
            "pipeline draws outside raftune."
        ) from error
    if not steps:
        raise _refusal(f"{_whose(binding)} scheduler was never asked for a step")
    return pictures, steps


def _difference(binding: PipelineAdapter, step: SchedulerStep, conditions: Conditions, call: PipelineCall) -> float:
    """The largest difference in one step, as a share of the largest number; infinite where shapes differ."""
    told, expected = binding.unpacked(step.told, call), binding.unpacked(step.output, call)
    expected = expected[:, : told.shape[1]]  # a learned variance may follow, which no loss here reads
    _refuse_not_finite(binding, expected, step)
    times = step.time.to(told.device).expand(len(told))
    try:
        predicted = binding.predict(told, times, conditions)
    except (RaftuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _refusal(f"raftune's call of {_whose(binding)} denoiser failed with {_said(error)}") from error
    if predicted.shape != expected.shape:
        return float("inf")
    return _apart(predicted, expected)


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest number that was expected."""
    peak = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.float() - expected.float()).abs().max() / peak.float())


def _limit(like: torch.Tensor) -> float:
    """The share that rounding may make of a difference in this precision."""
    return TOLERANCES.get(like.dtype, min(TOLERANCES.values()))


def _refuse_not_finite(binding: PipelineAdapter, output: torch.Tensor, step: SchedulerStep) -> None:
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            f"policy.model must give finite numbers; {_whose(binding)} denoiser gave NaN or infinity at step "
            f"{step.index + 1} in {str(output.dtype).removeprefix('torch.')}. Its weights are damaged, or its numbers "
            "leave that range: write policy.dtype: bfloat16 or float32."
        )


def _refuse_other_latents(
    binding: PipelineAdapter, pictures: SampledImages, last: SchedulerStep, call: PipelineCall
) -> None:
    """Raises ModelError where the latents that are kept are not those of the images."""
    x0 = pictures.x0
    shape, own = tuple(x0.shape[1:]), binding.latent_shape(call.height, call.width)
    if shape != own:
        raise _refusal(f"{_whose(binding)} latents have the shape {shape}, where raftune expects {own}")
    if not torch.equal(x0, binding.unpacked(last.latents, call)):
        raise _refusal(f"the latents that raftune keeps are not those that {_whose(binding)} last step left")
    if not all(pictures.finite) or binding.overflows:
        return
    again = tuple(binding.to_latents(pictures.images, torch.Generator("cpu").manual_seed(0)).shape)
    if again != tuple(x0.shape):
        raise _refusal(f"an image becomes latents of the shape {again[1:]}, where {_whose(binding)} own have {shape}")
    shown = [row for row, flagged in enumerate(pictures.flagged) if not flagged]  # a flagged one is painted over
    drawn = [np.asarray(pictures.images[row], dtype=np.float32) for row in shown]
    decoded = binding.to_pixels(x0).float().cpu().permute(0, 2, 3, 1).numpy() * 255
    apart = (float(np.abs(one - decoded[row]).max()) for row, one in zip(shown, drawn, strict=True))
    levels = max(apart, default=0.0)
    if levels > (2 if x0.dtype == torch.float32 else 16):
        raise _refusal(
            f"the latents that raftune keeps decode to other images than {_whose(binding)}, by {levels:.0f} of 255, "
            f"through its {type(getattr(binding.pipe, 'vae', None)).__name__}"
        )


def _refuse_noise_of_no_seed(binding: PipelineAdapter, conditions: Conditions, call: PipelineCall) -> None:
    """Raises ModelError where the second image is another once it is generated alone: its noise was not its seed's."""
    longer = replace(call, num_inference_steps=SEVERAL)
    pictures, _ = _drawn(binding, conditions, longer)
    alone, _ = _drawn(binding, conditions.take([1]), longer, (1,))
    if not all((*pictures.finite, *alone.finite)):
        return
    differs = _apart(alone.x0, pictures.x0[1:])
    if differs > GROWN * _limit(alone.x0):
        raise ModelError(
            f"An image must come of its own seed; generated again with the same seed, one of {_whose(binding)} "
            f"differs by "
            f"{differs:.3g} of its size: its {type(binding.pipe.scheduler).__name__} samples noise that no seed of "
            f"ours "
            "reaches. Save the pipeline with a scheduler that adds none while sampling, such as DDIMScheduler or "
            "DPMSolverMultistepScheduler (of a flow: FlowMatchEulerDiscreteScheduler)."
        )


def _whose(binding: PipelineAdapter) -> str:
    return f"the {type(binding.pipe).__name__}'s"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(str(error)).rstrip('.')}"


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"policy.model must be a pipeline that raftune can verify: {what}. raftune will not train what it cannot "
        "verify. Leave out sampling.diffusion.pipeline_kwargs that change what the denoiser is told, use the "
        "pipeline's own class and parts unchanged, or another version of diffusers (this is "
        f"{diffusers.__version__})."
    )
