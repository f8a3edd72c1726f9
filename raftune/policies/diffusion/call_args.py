"""Arguments of a pipeline call: `sampling.diffusion` over the pipeline's own defaults."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from raftune.config.sampling import DiffusionSampling
from raftune.errors import ConfigError
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall

# Of a pipeline's call what raftune gives itself, with where it is set; empty where it is nobody else's to say.
OURS = {
    **dict.fromkeys(
        ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt"), "sampling.diffusion"
    ),
    "num_images_per_prompt": "sampling.num_generations",
    "batch_size": "sampling.batch_size",
    **dict.fromkeys(("prompt", "class_labels"), "data.prompts"),
    **dict.fromkeys(("generator", "latents", "output_type", "return_dict", "image_embeds"), ""),
    **dict.fromkeys(("callback", "callback_steps", "callback_on_step_end"), ""),
    "callback_on_step_end_tensor_inputs": "",
}
OURS_BEGIN = ("prompt_embeds", "negative_prompt_", "pooled_", "negative_pooled_", "prompt_attention", "ip_adapter")


def call_of(binding: PipelineAdapter, sampling: DiffusionSampling) -> PipelineCall:
    """The call that draws a batch. Raises ConfigError for an option that this pipeline does not have or cannot
    follow.
    """
    known = parameters(binding)
    refuse_kwargs(binding, sampling.pipeline_kwargs, known)
    height, width = size_of(binding, sampling)
    for name in ("num_inference_steps", "guidance_scale"):
        if name not in known and getattr(sampling, name) is not None:
            raise ConfigError(_means_nothing(name, binding, getattr(sampling, name)))
    steps = sampling.num_inference_steps or known["num_inference_steps"]
    guidance = sampling.guidance_scale
    if guidance is None:
        guidance = known.get("guidance_scale", 1.0)
    call = PipelineCall(height, width, int(steps), float(guidance), sampling.pipeline_kwargs)
    refuse_negative(binding, sampling.negative_prompt, call, known)
    return call


def parameters(binding: PipelineAdapter) -> dict[str, Any]:
    """The defaults of the pipeline's call, by name."""
    found = inspect.signature(type(binding.pipe).__call__).parameters.values()
    return {one.name: one.default for one in found if one.name not in ("self", "kwargs", "args")}


def size_of(binding: PipelineAdapter, sampling: DiffusionSampling) -> tuple[int, int]:
    """Height and width in pixels. Raises ConfigError for a size that the pipeline cannot draw."""
    height, width = sampling.height, sampling.width
    if height is None or width is None:
        usual = binding.default_size()
        height, width = height or usual[0], width or usual[1]
    binding.refuse_size(height, width)
    return height, width


def is_guided(binding: PipelineAdapter, call: PipelineCall) -> bool:
    """True where every step asks the denoiser twice, with the prompt and with the negative one."""
    if "true_cfg_scale" in parameters(binding):  # the guidance scale itself is one more number the denoiser is told
        return float(call.kwargs.get("true_cfg_scale", 1.0)) > 1
    return call.guidance_scale > 1


def refuse_negative(
    binding: PipelineAdapter, negative: str | None, call: PipelineCall, known: Mapping[str, Any]
) -> None:
    """Raises ConfigError for a negative prompt that would have no effect."""
    if negative is None:
        return
    if "negative_prompt" not in known:
        raise ConfigError(_means_nothing("negative_prompt", binding, negative))
    if not is_guided(binding, call):
        dial = "pipeline_kwargs.true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
        raise ConfigError(
            f"sampling.diffusion.negative_prompt has an effect with {dial} above 1 only; got {negative!r} without it. "
            "Remove it, or raise the scale."
        )


def refuse_kwargs(binding: PipelineAdapter, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises ConfigError for pipeline_kwargs that raftune sets, that the binding refuses, or that are unknown."""
    pipeline = type(binding.pipe).__name__
    for name, value in given.items():
        where = f"sampling.diffusion.pipeline_kwargs must not hold {name!r}"
        if name in OURS or name.startswith(OURS_BEGIN):
            place = OURS.get(name, "")
            own = f"{place}.{name}" if place == "sampling.diffusion" else place
            raise ConfigError(f"{where}: raftune sets it. {f'Use {own}.' if own else 'Remove it.'}")
        if name in binding.refused:
            raise ConfigError(f"{where}: {binding.refused[name]}. Remove it.")
        if name not in known:
            taken = {*OURS, *binding.refused}
            free = sorted(one for one in known if one not in taken and not one.startswith(OURS_BEGIN))
            near = difflib.get_close_matches(name, free, 1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(free)}."
            raise ConfigError(
                f"sampling.diffusion.pipeline_kwargs must be what {pipeline} takes; got {name!r} ({value!r}). {hint}"
            )


def _means_nothing(name: str, binding: PipelineAdapter, given: Any) -> str:
    return (
        f"sampling.diffusion.{name} means nothing to a {type(binding.pipe).__name__}; got {given!r}. Remove it: this "
        "pipeline has no such option."
    )
