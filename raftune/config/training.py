"""The section `training`: how the policy is trained on the kept samples. All values are per round."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from raftune.config.base import ConfigSection
from raftune.config.extensions import SPEC

# Of transformers' TrainingArguments: what shapes a fit and is neither a field below nor set by raftune.
TRAINER_KWARGS = {
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs"),
    *("neftune_noise_alpha", "fp16", "tf32", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    "dataloader_drop_last",
}


class ReferenceConfig(ConfigSection):
    """A data set of good answers that is mixed into every round's rows against forgetting."""

    path: str = Field(description="JSONL, Parquet, CSV, or a hub name; needs the prompt and the completion column.")
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    fraction: float = Field(0.1, gt=0, lt=1, description="Share of reference rows among all rows of a round, by count.")


class DiffusionTraining(ConfigSection):
    """The denoising loss: in the pipeline's own parameterisation, at noise levels that a seed chooses."""

    noise_levels: int = Field(1, ge=1, description="Noise levels at which each row of a step is learned.")
    noise_range: tuple[float, float] = Field(
        (0.0, 1.0), description="Levels to learn, as shares of the schedule: 0 is the clean image, 1 pure noise."
    )
    level_sampling: Literal["uniform", "logit_normal"] | None = Field(
        None, description="How levels are chosen; None: logit-normal for flow matching, uniform for the others."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="Min-SNR weighting (arXiv 2303.09556); 5 is usual. Not for flow matching."
    )
    condition_dropout: float = Field(
        0.1, ge=0, lt=1, description="Share of rows learned without their prompt, so that guidance keeps working."
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="The round's model is this moving average of the weights; None: the last ones."
    )

    @model_validator(mode="after")
    def _levels_are_a_range(self) -> DiffusionTraining:
        low, high = self.noise_range
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"noise_range must be two shares of the schedule, 0 <= low < high <= 1; got [{low:g}, {high:g}]. "
                "Write [0, 1] for all levels."
            )
        return self


class TrainingConfig(ConfigSection):
    """One round's fit, on the exact token ids or latents that were generated."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak rate of the round's own schedule.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the kept rows in each round.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps in each round, in place of epochs; -1 is off.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Rows in a micro-batch; halved when memory runs out.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches in one optimizer step.")
    lr_scheduler_type: str = Field("linear", description="A schedule of transformers; it starts anew every round.")
    warmup_steps: float = Field(
        0, ge=0, description="Steps of rising rate at the start of each round; below 1: a share of the round's steps."
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    optim: str = Field("adamw_torch_fused", description="An optimizer of transformers' Trainer.")
    optimizer_state: Literal["fresh", "carried"] = Field("fresh", description="Anew each round, or moments carried on.")
    start_from: Literal["previous", "start"] = Field("previous", description="The model that each fit begins from.")
    loss_normalization: Literal["token", "sample", "prompt"] = Field(
        "token",
        description="The mean over tokens (long answers weigh more), samples, or prompts (each weighs the same).",
    )
    mask_truncated_completions: bool = Field(False, description="Leave out answers that were cut off before their end.")
    replay_rounds: int = Field(0, ge=0, description="How many earlier rounds' kept rows are trained on again.")
    reference: ReferenceConfig | None = Field(None, description="Reference answers mixed in against the alignment tax.")
    diffusion: DiffusionTraining = Field(
        default_factory=DiffusionTraining, description="The options of a denoising loss."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between further checkpoints; about one a minute there is in any case."
    )
    bf16: bool = Field(False, description="bfloat16 arithmetic over float32 weights (CUDA).")
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    trainer_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Of transformers' TrainingArguments what has no field here: adam_beta2, …"
    )

    @model_validator(mode="after")
    def _trainer_kwargs_take_effect(self) -> TrainingConfig:
        if unknown := sorted(set(self.trainer_kwargs) - TRAINER_KWARGS):
            raise ValueError(
                f"trainer_kwargs may hold {', '.join(sorted(TRAINER_KWARGS))}; got {unknown[0]!r}. Use the field of "
                "the configuration where there is one; what else Trainer takes has no effect on a round: leave it out."
            )
        return self

    @model_validator(mode="after")
    def _carried_moments_belong_to_the_weights(self) -> TrainingConfig:
        if self.optimizer_state == "carried" and self.start_from == "start":
            raise ValueError(
                "optimizer_state must be fresh where start_from is 'start'; got 'carried'. The moments belong to "
                "weights that each round throws away: set optimizer_state: fresh."
            )
        return self


class SftTraining(TrainingConfig):
    """Minimises the weighted loss of what was kept: the negative log-likelihood, or the denoising error."""

    objective: Literal["sft"] = Field(
        "sft",
        description="What training minimises: sft, the weighted loss of the kept samples, or an objective of your own "
        "(file.py:NAME, module:NAME).",
    )


class CustomTraining(TrainingConfig):
    """Minimises an objective of your own, with options that its class declares."""

    objective: str = Field(pattern=SPEC, description="file.py:NAME or module:NAME; docs/extending.md says how.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of an objective of your own, by name.")


def objective_class(data: Any) -> str:
    """The tag of the section with this objective; the objective itself where there is none."""
    given = data.get("objective", "sft") if isinstance(data, dict) else getattr(data, "objective", "sft")
    return "custom" if ":" in str(given) else str(given)


AnyTraining = Annotated[
    Annotated[SftTraining, Tag("sft")] | Annotated[CustomTraining, Tag("custom")], Discriminator(objective_class)
]
