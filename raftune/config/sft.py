"""Configuration of supervised fine-tuning (`raftune sft`)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from raftune.config.base import COLUMNS_FIELD, THREADS_FIELD, ColumnNames, ConfigSection
from raftune.config.policy import PolicyConfig
from raftune.config.training import TrainingConfig

# Fields of `training` that only make sense with several rounds.
OF_ROUNDS = ("optimizer_state", "start_from", "replay_rounds", "reference")


class DemonstrationsConfig(ConfigSection):
    """Demonstrations: preferred completions of preferences, prompts with completions, or dialogues."""

    path: str = Field(description="JSONL (also gzipped), JSON, CSV or Parquet, a `datasets` folder, or a hub name.")
    split: str = Field("train", description="Split of a hub or `datasets` folder.")
    limit: int | None = Field(None, ge=1, description="Use the first N completions only.")
    columns: ColumnNames = COLUMNS_FIELD
    min_score: float | None = Field(None, description="Lowest score of completions that are trained on.")
    keep: Literal["best", "all"] | None = None
    """For completions with a score: best, the first of the highest of each prompt; all, every one."""
    dialogues: Literal["text", "messages"] = "text"
    """HH-RLHF dialogues as text, or as messages for a chat template."""
    held_out_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the prompts that is held out, chosen by hash."""


class ImageSize(ConfigSection):
    """Image size of a pipeline. It must be that of the data; images are not cropped or scaled."""

    height: int | None = Field(None, ge=1, description="Pixels; None: the pipeline's default.")
    width: int | None = Field(None, ge=1, description="Pixels; None: the pipeline's default.")


class SftSamplingConfig(ConfigSection):
    """The fields of `sampling` that say how images are read."""

    diffusion: ImageSize = Field(default_factory=ImageSize, description="For diffusion pipelines.")


class SftConfig(ConfigSection):
    """Configuration of supervised fine-tuning. Equal ones give bit-identical models on a CPU."""

    output_dir: str = Field(description="The output directory.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all randomness.")
    threads: int = THREADS_FIELD
    max_length: int | None = Field(None, ge=2)
    """Maximum tokens of prompt and completion; longer ones are cut. None: the model's context."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the chat template.")
    data: DemonstrationsConfig
    policy: PolicyConfig
    sampling: SftSamplingConfig = Field(default_factory=SftSamplingConfig, description="How images are read.")
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @model_validator(mode="after")
    def _there_is_one_round(self) -> SftConfig:
        for name in OF_ROUNDS:
            value = getattr(self.training, name)
            if value != TrainingConfig.model_fields[name].default:
                raise ValueError(f"training.{name} speaks of rounds, and sft has none; got {value!r}. Leave it out.")
        return self
