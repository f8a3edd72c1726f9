"""How the policy is fitted to what was kept; epochs, steps and rate are meant per round."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raftune.config.base import Frozen


class ReferenceConfig(Frozen):
    """A data set of good answers that is mixed into every round's rows against forgetting."""

    path: str = Field(description="JSONL, Parquet, CSV, or a hub name; needs the prompt and the completion column.")
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    fraction: float = Field(0.1, gt=0, lt=1, description="Share of reference rows among all rows of a round, by count.")


class TuningConfig(Frozen):
    """One round's fit, on the exact token ids or latents that were drawn."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak rate of the round's own schedule.")
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the kept rows in each round.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps in each round, in place of epochs; -1 is off.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Rows in a micro-batch; halved when memory runs out.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches in one optimizer step.")
    lr_scheduler_type: str = Field("linear", description="A schedule of transformers; it starts anew every round.")
    warmup_steps: int = Field(0, ge=0, description="Steps of rising rate at the start of each round.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    optim: str = Field("adamw_torch", description="An optimizer of transformers' Trainer.")
    optimizer_state: Literal["fresh", "carried"] = Field("fresh", description="Begin each round anew, or carry moments on.")
    start_from: Literal["previous", "start"] = Field("previous", description="The model that a round's fit begins from.")
    loss_normalization: Literal["token", "sample", "prompt"] = Field(
        "token",
        description="The mean is over tokens (long answers weigh more), samples, or prompts (each prompt weighs the same).",
    )
    mask_truncated_completions: bool = Field(False, description="Leave out answers that were cut off before their end.")
    replay_rounds: int = Field(0, ge=0, description="How many earlier rounds' kept rows are trained on again.")
    reference: ReferenceConfig | None = Field(None, description="Reference answers mixed in against the alignment tax.")
    save_steps: int = Field(100, ge=1, description="Optimizer steps between checkpoints inside a round.")
    bf16: bool = Field(False, description="bfloat16 arithmetic over float32 weights (CUDA).")
    gradient_checkpointing: bool = Field(False, description="Less memory for about a third more time.")
    trainer_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Anything else that transformers' TrainingArguments takes."
    )

    @model_validator(mode="after")
    def _trainer_kwargs_are_not_ours(self) -> TuningConfig:
        ours = {"output_dir", "seed", "data_seed", "save_strategy", "report_to"} | set(type(self).model_fields)
        if clash := sorted(ours & set(self.trainer_kwargs)):
            raise ValueError(f"trainer_kwargs must not hold {clash[0]!r}: raftune sets it. Use the field of the configuration.")
        return self
