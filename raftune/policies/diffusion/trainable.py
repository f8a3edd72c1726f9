"""Refuses pipelines that cannot be trained, before weights are loaded."""

from __future__ import annotations

from raftune.config.training import DiffusionTraining
from raftune.errors import ConfigError, ModelError
from raftune.policies.diffusion import lora
from raftune.policies.diffusion.pipelines.base import PipelineAdapter
from raftune.policies.diffusion.schedules import refuse_unfit, schedule_of
from raftune.policies.unsupported import FamilyConfig

# Of training.trainer_kwargs what transformers' own models alone understand.
UNTOLD = {"neftune_noise_alpha", "gradient_checkpointing_kwargs"}


def refuse_untunable(config: FamilyConfig, binding: PipelineAdapter, shape: tuple[int, int, int]) -> None:
    """Raises ModelError or ConfigError for what no round of this run could tune; needs no weights.

    A scheduler without a known loss, an option that means nothing on its schedule, an adapter that fits nowhere.
    """
    refuse_other_channels(binding, shape)
    refuse_distilled(binding)
    refuse_unfit(schedule_of(binding.pipe, binding.denoiser, shape), config.training.diffusion)
    for name in UNTOLD & set(config.training.trainer_kwargs):
        raise ConfigError(
            f"training.trainer_kwargs must not hold {name!r} for a diffusion model: it is of text. Remove it."
        )
    dropout = config.training.diffusion.condition_dropout
    if binding.takes == "nothing" and dropout not in (0, DiffusionTraining().condition_dropout):
        raise ConfigError(
            f"training.diffusion.condition_dropout means nothing to a {type(binding.pipe).__name__}, which takes no "
            f"prompt; got {dropout:g}. Remove it."
        )
    if config.policy.adapter is not None:
        lora.targets(binding.denoiser, config.policy.adapter)
    elif config.policy.dtype == "float16":
        raise ConfigError(
            "policy.dtype must be float32 or bfloat16 where the whole denoiser is trained; got float16, in which small "
            "gradients vanish. Write bfloat16, or train an adapter."
        )


def refuse_other_channels(binding: PipelineAdapter, shape: tuple[int, int, int]) -> None:
    """Raises ModelError for a denoiser that is given more than a noisy latent, as those of inpainting are."""
    vae = getattr(binding.pipe, "vae", None)
    if vae is not None and vae.config.latent_channels != shape[0]:
        raise ModelError(
            f"policy.model must be a pipeline that generates from noise alone; this {type(binding.pipe).__name__}'s "
            f"{type(binding.denoiser).__name__} takes latents of {shape[0]} channels, and those of its "
            f"{type(vae).__name__} have {vae.config.latent_channels}: it was made to fill in or to edit images. Use "
            "the text-to-image model of the same kind."
        )


def refuse_distilled(binding: PipelineAdapter) -> None:
    """Raises ModelError for a UNet that is told the guidance scale, as those are that were made to take few steps."""
    if width := binding.denoiser.config.get("time_cond_proj_dim"):
        raise ModelError(
            f"policy.model must be a pipeline whose training loss is known; the {type(binding.pipe).__name__}'s "
            f"{type(binding.denoiser).__name__} has time_cond_proj_dim {width}: it was distilled to few steps (LCM), "
            "and a denoising loss would undo that. Use the pipeline that it was distilled "
            "from. (It can be generated and evaluated with num_rounds: 0.)"
        )
