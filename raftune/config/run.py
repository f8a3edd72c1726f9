"""The configuration of a whole run."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from raftune.config.base import COLUMNS_FIELD, ColumnNames, ConfigSection
from raftune.config.evaluation import EvaluationConfig
from raftune.config.extensions import SPEC
from raftune.config.guards import GuardsConfig
from raftune.config.policy import PolicyConfig
from raftune.config.rewards import RewardsConfig
from raftune.config.sampling import SamplingConfig
from raftune.config.selection import AnySelection, BestOfK
from raftune.config.training import AnyTraining, SftTraining


class DataConfig(ConfigSection):
    """The prompts. All other columns of the data set are passed to the rewards."""

    prompts: str | None = None
    """JSONL, JSON, CSV or Parquet file, a `datasets` folder, a hub name, a run's directory (its own prompts), or
    'starter'."""
    split: str = Field("train", description="Split of a hub or `datasets` folder.")
    prompt_column: str = Field("prompt", description="Column that holds the prompt: text, messages, or a class label.")
    limit: int | None = Field(None, ge=1, description="Use the first N rows only.")
    columns: ColumnNames = COLUMNS_FIELD


class EngineConfig(ConfigSection):
    """Where chunks run. The results do not depend on the number of workers."""

    shorthand: ClassVar[str] = "kind"
    kind: str = Field("local", pattern=f"^(local|ray)$|{SPEC}")
    """local (this process, or `workers` processes), ray (actors of a Ray cluster), or a custom engine: file.py:NAME."""
    workers: int = Field(1, ge=1, description="Processes that generate and score; 1: this process only, if local.")
    launch: tuple[str, ...] = ()
    """Command that runs a local worker's own command, such as [srun, -n1, --gpus=1]; {slot} is the worker's number."""
    address: str | None = None
    """Ray only: auto (the cluster of this machine), HOST:PORT of a cluster, or local (start one here). None: auto."""
    resources: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Ray only: what each worker needs, such as {GPU: 1, CPU: 4}. CPU is 1 unless given."""
    start_timeout: float | None = Field(600.0, gt=0)
    """Seconds to wait for the first worker, which may be in a queue. none waits for good."""
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Threads per process for tensor arithmetic on the CPU."""
    max_retries: int = Field(2, ge=0, description="Retries of a chunk that crashed its worker.")
    on_chunk_failure: Literal["stop", "skip"] = "stop"
    """After the last retry: stop the run, or continue without the chunk."""
    chunk_timeout: float | None = Field(None, gt=0)
    """Seconds after which a chunk in a worker counts as crashed."""
    options: dict[str, Any] = Field(default_factory=dict, description="Options of a custom engine.")

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> EngineConfig:
        for field, kind in (("launch", "local"), ("address", "ray"), ("resources", "ray")):
            if (value := getattr(self, field)) and self.kind != kind:
                raise ValueError(
                    f"engine.{field} is for engine.kind: {kind}; got {value!r} with {self.kind!r}. Leave it out, or "
                    f"write kind: {kind}."
                )
        return self

    @model_validator(mode="after")
    def _options_have_an_engine(self) -> EngineConfig:
        if self.options and ":" not in self.kind:
            raise ValueError(
                f"engine.options are those of a custom engine; got {', '.join(self.options)} with engine.kind "
                f"{self.kind!r}, which has none. Leave them out."
            )
        return self


class StopConfig(ConfigSection):
    """Early stopping. The best round is published in any case."""

    patience: int | None = Field(None, ge=1, description="Stop after N rounds without a new best held-out reward.")
    min_gain: float = Field(0.0, ge=0, description="Smallest gain that counts as a new best, in reward units.")
    max_falls: int | None = Field(None, ge=1)
    """Stop after N rounds in a row in which the held-out reward fell and the trained one rose."""
    max_kl: float | None = Field(None, gt=0)
    """Stop when the KL to the initial model exceeds this, in nats per completion."""
    empty_rounds: int | None = Field(3, ge=1)
    """Stop after N rounds in a row without training rows; such a round leaves the policy unchanged. none never
    stops."""


class RunConfig(ConfigSection):
    """The configuration of a run. Equal configurations give bit-identical runs on a CPU."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Letters, digits, '.', '_' and '-'."""
    output_dir: str | None = Field(None, description="The run's directory; None: runs/NAME.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all randomness.")
    num_rounds: int = Field(8, ge=0, description="Maximum number of rounds. 0 evaluates the initial model only.")
    prompts_per_round: int = Field(64, ge=1, description="Prompts in each round, without replacement within an epoch.")
    keep_models: Literal["all", "best", "last"] = "all"
    """Which rounds' models are kept. All samples are kept."""
    keep_latents: Literal["all", "selected"] = "all"
    """Which latents are kept after a round: all, or those of selected samples. Images are kept; `--from generate`
    generates the same latents again."""
    report_to: tuple[str, ...] = Field((), description="Trackers, as in transformers: tensorboard, wandb, mlflow, …")
    report: bool = Field(True, description="Write report.html after every round.")
    data: DataConfig = Field(default_factory=DataConfig)
    policy: PolicyConfig
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    selection: AnySelection = Field(default_factory=BestOfK)
    training: AnyTraining = Field(default_factory=SftTraining)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    stop: StopConfig = Field(default_factory=StopConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)

    @model_validator(mode="after")
    def _there_is_something_to_do(self) -> RunConfig:
        if self.num_rounds and self.data.prompts is None:
            raise ValueError(
                "data.prompts must be given; it has no default. Name the prompts to learn from: a file, a hub name, or "
                "'starter'."
            )
        if not self.num_rounds and self.data.prompts is None and self.evaluation.prompts is None:
            raise ValueError(
                "evaluation.prompts must name the prompts to judge by; got none, and no data.prompts to hold any out "
                "of. Add --evaluation.prompts FILE."
            )
        if not self.num_rounds and not self.evaluation.num_prompts:
            raise ValueError(
                "evaluation.num_prompts must be above 0 where num_rounds is 0; got 0. Without rounds there is nothing "
                "to do but to judge: raise it."
            )
        return self

    @model_validator(mode="after")
    def _evaluations_suffice(self) -> RunConfig:
        """Stop rules, alarms and measures get the evaluations that they need."""
        evaluation, stop, guards = self.evaluation, self.stop, self.guards
        if guards.stop_on and not guards.enabled:
            raise ValueError(
                f"guards.stop_on needs guards.enabled: true; got {', '.join(guards.stop_on)} with the guards off. "
                "Turn them on, or leave out guards.stop_on."
            )
        for field, value, needed in (
            ("stop.patience", stop.patience, "evaluations"),
            ("evaluation.reference_column", evaluation.reference_column, "held-out prompts"),
            ("evaluation.features", evaluation.features, "held-out prompts, whose images it compares"),
        ):
            if value is not None and not evaluation.num_prompts:
                raise ValueError(
                    f"{field} needs {needed}; got evaluation.num_prompts = 0. Set it above 0, or leave out {field}."
                )
        for field, option, used in (
            ("stop.max_falls", "stop.max_falls", stop.max_falls is not None),
            ("guards.stop_on: held_out_falls", "held_out_falls", "held_out_falls" in guards.stop_on),
        ):
            if used and not (evaluation.reward_funcs and evaluation.num_prompts):
                raise ValueError(
                    f"{field} needs a held-out reward; got no evaluation.reward_funcs or no evaluation.num_prompts. "
                    f"Name a reward that the policy is not trained on, or leave out {option}."
                )
        for field, option, used in (
            ("stop.max_kl", "stop.max_kl", stop.max_kl is not None),
            ("guards.stop_on: kl_beyond_budget", "kl_beyond_budget", "kl_beyond_budget" in guards.stop_on),
            ("guards.max_kl", "guards.max_kl", guards.max_kl is not None),
        ):
            if used and not (evaluation.kl and evaluation.num_prompts):
                raise ValueError(
                    f"{field} needs evaluation.kl: true and evaluation.num_prompts above 0; got them off. Turn them "
                    f"on, or leave out {option}."
                )
        return self

    @model_validator(mode="after")
    def _rounds_can_be_compared(self) -> RunConfig:
        judged = self.num_rounds and self.evaluation.num_prompts
        if judged and self.rewards.combine == "rank" and self.evaluation.best_by == "reward":
            raise ValueError(
                "evaluation.best_by must name one reward where rewards.combine is rank; got 'reward'. A rank compares "
                "the candidates of one prompt and no rounds: write held_out, or the name of a reward."
            )
        return self


def held_out_names(config: RunConfig) -> tuple[str, ...]:
    """The names of the held-out rewards."""
    return config.rewards.model_copy(update={"reward_funcs": config.evaluation.reward_funcs}).names
