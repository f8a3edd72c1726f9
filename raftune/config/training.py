"""The section `training`: how the policy is trained on the kept samples. All values are per round."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from raftune.config.base import ConfigSection, tag_of
from raftune.config.extensions import SPEC

# Of transformers' TrainingArguments: what shapes a fit and is neither a field below nor set by raftune.
TRAINER_KWARGS = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs"),
    *("neftune_noise_alpha", "fp16", "tf32", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    "dataloader_drop_last",
)

SHARING = frozenset({"processes", "parallel"})  # fields that say who trains, and not what


class ReferenceConfig(ConfigSection):
    """Reference completions that are mixed into every round's rows, against forgetting."""

    path: str = Field(description="JSONL, Parquet, CSV or a hub name, with a prompt and a completion column.")
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    fraction: float = Field(0.1, gt=0, lt=1, description="Share of reference rows in a round.")


class DiffusionTraining(ConfigSection):
    """The denoising loss, in the pipeline's own parameterisation."""

    noise_levels: int = Field(1, ge=1, description="Noise levels per row and step.")
    noise_range: tuple[float, float] = (0.0, 1.0)
    """Range of noise levels, as shares of the schedule: 0 is the clean image, 1 pure noise."""
    level_sampling: Literal["uniform", "logit_normal"] | None = None
    """Distribution of the levels; None: logit-normal for flow matching, otherwise uniform."""
    min_snr_gamma: float | None = Field(None, gt=0)
    """Min-SNR weighting (arXiv 2303.09556); 5 is usual. Not for flow matching."""
    condition_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of rows trained without their prompt, for classifier-free guidance."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the weights, which becomes the round's model; None: the last weights."""

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
    """The training of one round, on the exact token ids or latents that were generated."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of each round's schedule.")
    num_train_epochs: float = Field(1.0, gt=0, description="Epochs over the kept rows in each round.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps in each round, instead of epochs; -1 is off.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Rows in a micro-batch; halved when memory runs out.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    lr_scheduler_type: str = Field("linear", description="A schedule of transformers; restarts every round.")
    warmup_steps: float = Field(0, ge=0)
    """Warm-up steps of each round; below 1: a share of the round's steps."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    optim: str = Field("adamw_torch_fused", description="An optimizer of transformers' Trainer.")
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    """Optimizer state: new in each round, or carried over."""
    start_from: Literal["previous", "start"] = "previous"
    """The model that each round's training starts from."""
    loss_normalization: Literal["token", "sample", "prompt"] = "token"
    """The loss is a mean over tokens (long completions weigh more), samples, or prompts."""
    mask_truncated_completions: bool = Field(False, description="Leave out completions that were cut off.")
    replay_rounds: int = Field(0, ge=0, description="Number of earlier rounds whose kept rows are trained on again.")
    reference: ReferenceConfig | None = Field(None, description="Reference completions that are mixed in.")
    diffusion: DiffusionTraining = Field(default_factory=DiffusionTraining)
    """Options of the denoising loss."""
    processes: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Processes that train together, each on a GPU of its own (or a share of the CPU's threads); auto: one for each
    visible GPU. They share the rows of a step: its size stays per_device_train_batch_size x
    gradient_accumulation_steps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What processes hold: ddp, each the whole model; fsdp, each a shard of it (FSDP2), for models larger than a
    GPU."""
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between additional checkpoints; one a minute is always saved."""
    bf16: bool = Field(False, description="bfloat16 arithmetic over float32 weights (CUDA).")
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third more time.")
    trainer_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further TrainingArguments of transformers: adam_beta2, …"""

    @model_validator(mode="after")
    def _trainer_kwargs_take_effect(self) -> TrainingConfig:
        if unknown := sorted(set(self.trainer_kwargs).difference(TRAINER_KWARGS)):
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
    """Minimises the weighted loss of the kept samples: negative log-likelihood or denoising error."""

    objective: Literal["sft"] = "sft"
    """What training minimises: sft, the weighted loss of the kept samples, or a custom objective (file.py:NAME,
    module:NAME)."""


class CustomTraining(TrainingConfig):
    """A custom objective. Its class declares the options."""

    objective: str = Field(pattern=SPEC, description="file.py:NAME or module:NAME; see docs/extending.md.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of a custom objective.")


AnyTraining = Annotated[
    Annotated[SftTraining, Tag("sft")] | Annotated[CustomTraining, Tag("custom")],
    Discriminator(tag_of("objective", "sft")),
]
