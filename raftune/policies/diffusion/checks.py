"""Checks of a run's options against a pipeline, before weights are loaded; and the call by which it generates."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from raftune.config.sampling import DiffusionSampling
from raftune.config.training import DiffusionTraining
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, PipelineCall
from raftune.policies.diffusion.schedules import check_schedule_options, schedule_of
from raftune.policies.unsupported import FamilyConfig

# Arguments of a pipeline's call that raftune sets, with the field to use; empty where there is none.
OURS = {
    **{
        name: f"sampling.diffusion.{name}"
        for name in ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt")
    },
    "num_images_per_prompt": "sampling.num_generations",
    "batch_size": "sampling.batch_size",
    **dict.fromkeys(("prompt", "class_labels"), "data.prompts"),
    **dict.fromkeys(("generator", "latents", "output_type", "return_dict", "image_embeds"), ""),
    **dict.fromkeys(("callback", "callback_steps", "callback_on_step_end"), ""),
    "callback_on_step_end_tensor_inputs": "",
}
OURS_BEGIN = ("prompt_embeds", "negative_prompt_", "pooled_", "negative_pooled_", "prompt_attention", "ip_adapter")


def check_options(
    field: str, options: Mapping[str, Any], ours: Mapping[str, str], known: Iterable[str], pipeline: str
) -> None:
    """Raises ConfigError for options that raftune sets itself, by the field `ours` has, and for unknown ones."""
    free = sorted({*known} - {*ours})
    for name, value in options.items():
        if (other := ours.get(name)) is not None:
            fix = f"Use {other}." if other else "Remove it."
            raise ConfigError(f"{field} must not hold {name!r}: raftune sets it. {fix}")
        if name not in free:
            near = difflib.get_close_matches(name, free, 1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(free)}."
            raise ConfigError(f"{field} must be what {pipeline} takes; got {name!r} ({value!r}). {hint}")


# -- generating --------------------------------------------------------------------------------------------------------


def call_of(adapter: PipelineAdapter, sampling: DiffusionSampling) -> PipelineCall:
    """`sampling.diffusion` over the pipeline's own defaults. Raises ConfigError for an option that this pipeline does
    not have or cannot follow."""
    known = parameters(adapter)
    field = "sampling.diffusion.pipeline_kwargs"
    for name in adapter.refused.keys() & sampling.pipeline_kwargs.keys():
        raise ConfigError(f"{field} must not hold {name!r}: {adapter.refused[name]}. Remove it.")
    ours = OURS | {name: "" for name in {*known, *sampling.pipeline_kwargs} if name.startswith(OURS_BEGIN)}
    check_options(field, sampling.pipeline_kwargs, ours, known.keys() - adapter.refused, type(adapter.pipe).__name__)
    height, width = sampling.height, sampling.width
    if height is None or width is None:
        usual = adapter.default_size()
        height, width = height or usual[0], width or usual[1]
    adapter.check_size(height, width)
    for name in ("num_inference_steps", "guidance_scale", "negative_prompt"):
        if name not in known and (value := getattr(sampling, name)) is not None:
            raise ConfigError(
                f"sampling.diffusion.{name} means nothing to a {type(adapter.pipe).__name__}; got {value!r}. Remove "
                "it: this pipeline has no such option."
            )
    steps, guidance = sampling.num_inference_steps or known["num_inference_steps"], sampling.guidance_scale
    if guidance is None:
        guidance = known.get("guidance_scale", 1.0)
    call = PipelineCall(height, width, int(steps), float(guidance), sampling.pipeline_kwargs)
    if sampling.negative_prompt is not None and not is_guided(adapter, call):
        option = "pipeline_kwargs.true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
        raise ConfigError(
            f"sampling.diffusion.negative_prompt has an effect with {option} above 1 only; got "
            f"{sampling.negative_prompt!r} without it. Remove it, or raise the scale."
        )
    return call


def parameters(adapter: PipelineAdapter) -> dict[str, Any]:
    """The defaults of the pipeline's call, by name."""
    signature = inspect.signature(type(adapter.pipe).__call__).parameters.values()
    return {option.name: option.default for option in signature if option.name not in ("self", "kwargs", "args")}


def is_guided(adapter: PipelineAdapter, call: PipelineCall) -> bool:
    """Whether every step calls the denoiser twice, with the prompt and with the negative one."""
    if "true_cfg_scale" in parameters(adapter):  # there the guidance scale is an input of the denoiser
        return float(call.kwargs.get("true_cfg_scale", 1.0)) > 1
    return call.guidance_scale > 1


# -- training ----------------------------------------------------------------------------------------------------------


def check_trainable(config: FamilyConfig, adapter: PipelineAdapter, shape: tuple[int, int, int]) -> None:
    """Raises ModelError or ConfigError for what no round of this run could train; needs no weights.

    An inpainting or distilled denoiser, a scheduler without a known loss, an option that means nothing on its schedule,
    an adapter that fits nowhere.
    """
    check_channels(adapter, shape)
    check_not_distilled(adapter)
    check_schedule_options(schedule_of(adapter.pipe, adapter.denoiser, shape), config.training.diffusion)
    for name in {"neftune_noise_alpha", "gradient_checkpointing_kwargs"} & set(config.training.trainer_kwargs):
        raise ConfigError(
            f"training.trainer_kwargs must not hold {name!r} for a diffusion model: it is of text. Remove it."
        )
    dropout = config.training.diffusion.condition_dropout
    if adapter.takes == "nothing" and dropout not in (0, DiffusionTraining().condition_dropout):
        raise ConfigError(
            f"training.diffusion.condition_dropout means nothing to a {type(adapter.pipe).__name__}, which takes no "
            f"prompt; got {dropout:g}. Remove it."
        )
    if config.policy.adapter is not None:
        lora.targets(adapter.denoiser, config.policy.adapter)
    elif config.policy.dtype == "float16":
        raise ConfigError(
            "policy.dtype must be float32 or bfloat16 where the whole denoiser is trained; got float16, in which small "
            "gradients vanish. Write bfloat16, or train an adapter."
        )


def check_channels(adapter: PipelineAdapter, shape: tuple[int, int, int]) -> None:
    """Raises ModelError for a denoiser with more inputs than a noisy latent, as those of inpainting have."""
    vae = getattr(adapter.pipe, "vae", None)
    if vae is not None and vae.config.latent_channels != shape[0]:
        raise ModelError(
            f"policy.model must be a pipeline that generates from noise alone; this {type(adapter.pipe).__name__}'s "
            f"{type(adapter.denoiser).__name__} takes latents of {shape[0]} channels, and those of its "
            f"{type(vae).__name__} have {vae.config.latent_channels}: it was made to fill in or to edit images. Use "
            "the text-to-image model of the same kind."
        )


def check_not_distilled(adapter: PipelineAdapter) -> None:
    """Raises ModelError for a UNet that takes the guidance scale as input: it was distilled to few steps."""
    if width := adapter.denoiser.config.get("time_cond_proj_dim"):
        raise ModelError(
            f"policy.model must be a pipeline whose training loss is known; the {type(adapter.pipe).__name__}'s "
            f"{type(adapter.denoiser).__name__} has time_cond_proj_dim {width}: it was distilled to few steps (LCM), "
            "and a denoising loss would undo that. Use the pipeline that it was distilled "
            "from. (It can be generated and evaluated with num_rounds: 0.)"
        )
