"""Configuration of reward model training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raftune.config.base import COLUMNS_FIELD, THREADS_FIELD, ColumnNames, ConfigSection
from raftune.config.policy import AdapterConfig


class RewardModelConfig(ConfigSection):
    """Configuration of reward model training."""

    data: str
    """Preferences or ratings: a file of JSON lines (.gz too), Parquet or CSV, a `datasets` folder, or a hub name."""
    model: str
    """The backbone, encoder or decoder: a folder, a hub name, or 'starter' for the bundled policy."""
    output_dir: str = Field(description="Output directory for model/, report.json, held_out.parquet and skipped.jsonl.")
    objective: Literal["auto", "pairwise", "pointwise"] = "auto"
    """pairwise: Bradley-Terry on preferences; pointwise: squared error on ratings; auto: by data."""
    split: str = Field("train", description="Split of a hub or `datasets` folder.")
    columns: ColumnNames = COLUMNS_FIELD
    dialogues: Literal["text", "messages"] = "text"
    """HH-RLHF dialogues as text, or as messages for a chat template."""
    lowest_rating: float | None = Field(None, description="Lower ratings are skipped and reported.")
    highest_rating: float | None = Field(None, description="Higher ratings are skipped and reported.")
    held_out: str | None = None
    """Data for evaluation; None: a share of the prompts of `data`. Prompts that are trained on are left out."""
    held_out_split: str = Field("test", description="Split of held_out, in a hub or `datasets` folder.")
    held_out_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of prompts that is held out, with all their rows; at least 20, or half."""
    revision: str | None = Field(None, description="Branch, tag or commit of the backbone on the hub.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Data type of the backbone's weights.")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: a GPU if available.")
    trust_remote_code: bool = Field(False, description="Run code from the backbone's repository. Read it first.")
    replace_head: bool = Field(False, description="Replace the head of a classifier with several labels.")
    adapter: AdapterConfig | None = None
    """LoRA: less memory. It is merged into the backbone when saved."""
    append_eos: bool | None = None
    """End plain texts with the EOS token; None: if the tokenizer has one and does not add it itself."""
    max_length: int = Field(1024, ge=8)
    """Maximum tokens of prompt and completion; longer rows lose their beginning, and are counted."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; None: 1e-3 below 10M trained parameters, 5e-5 below 500M, 1e-5 above, 1e-4 for LoRA."""
    num_train_epochs: float = Field(1.0, gt=0, description="Epochs; reward models overfit quickly.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps, instead of epochs; -1 is off.")
    per_device_train_batch_size: int = Field(16, ge=1, description="Rows in a micro-batch; a pair is one row.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    lr_scheduler_type: str = Field("cosine", description="A schedule of transformers.")
    warmup_steps: float = Field(0.05, ge=0, description="Warm-up steps; below 1: a share of all steps.")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    center_rewards_coefficient: float | None = Field(None, ge=0)
    """Pairwise only: weight of the squared sum of a pair's scores, which centres them; 0.01."""
    disable_dropout: bool = True
    """As in TRL. With dropout the two completions of a pair differ by noise."""
    bf16: bool = Field(False, description="bfloat16 arithmetic over float32 weights (CUDA).")
    gradient_checkpointing: bool = Field(False, description="Less memory, about a third more time.")
    save_steps: int | None = Field(None, ge=1)
    """Optimizer steps between additional checkpoints; one a minute is always saved."""
    threads: int = THREADS_FIELD
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the split, the new head and the row order.")
    allow_chance: bool = Field(False, description="Save the model even if it is not better than chance.")

    @model_validator(mode="after")
    def _bfloat16_weights_are_not_trained(self) -> RewardModelConfig:
        if self.dtype == "bfloat16" and self.adapter is None:
            raise ValueError(
                "dtype must be float32 where all weights are trained; got 'bfloat16', which rounds most updates away. "
                "Set bf16: true for fast arithmetic over float32 weights, or add `adapter: {r: 16}`."
            )
        return self

    @model_validator(mode="after")
    def _the_range_has_two_ends(self) -> RewardModelConfig:
        low, high = self.lowest_rating, self.highest_rating
        if low is not None and high is not None and low >= high:
            raise ValueError(f"lowest_rating must be below highest_rating; got {low:g} and {high:g}. Swap them.")
        return self


def rate_for(trained: int, adapter: bool) -> float:
    """The default peak learning rate for so many trained parameters: small models need a higher one."""
    if adapter:
        return 1e-4
    return 1e-3 if trained < 10_000_000 else 5e-5 if trained < 500_000_000 else 1e-5
