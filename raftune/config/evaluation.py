"""The section `evaluation`: measurement on held-out prompts after every round."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from raftune.config.base import ConfigSection
from raftune.config.extensions import SPEC
from raftune.config.rewards import RewardSpec, derived_name, unique_names

FEWEST_UNITS = 5  # prompts: of fewer a mean is said with their number, and without an interval


class MetricSpec(ConfigSection):
    """A metric of your own. A plain string stands for a spec with every other field at its default."""

    spec: str = Field(pattern=SPEC, description="file.py:NAME or module:NAME; docs/extending.md says how.")
    name: str | None = Field(
        None, pattern=r"^[\w.\-]+$", description="Name metrics/NAME in metrics.json; None derives it from the spec."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the metric, by name.")

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_spec(cls, value: Any) -> Any:
        return {"spec": value} if isinstance(value, str) else value


class EvaluationConfig(ConfigSection):
    """Held-out prompts, generated with the same seeds in every round, so that rounds and runs can be paired."""

    prompts: str | None = Field(
        None,
        description="Held-out prompts, or a run's directory (its own); None: a tenth of the training prompts, "
        "five at the least, is held out.",
    )
    split: str = Field("test", description="Split of a hub or `datasets` folder.")
    num_prompts: int = Field(
        64, ge=0, description="Held-out prompts at most; 0 turns evaluation off (the last round is published)."
    )
    num_generations: int = Field(
        4, ge=1, description="Samples of each held-out prompt; best-of-k is estimated up to this k."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds of evaluation samples: the same in every round and run.")
    reward_funcs: tuple[RewardSpec, ...] = Field((), description="Held-out rewards: reported, never trained on.")
    best_by: str = Field(
        "reward", description="What the best round is chosen by: 'reward', or a held-out reward's name."
    )
    metrics: tuple[MetricSpec, ...] = Field(
        (), description="Metrics of your own beside the built-in ones (file.py:NAME, module:NAME)."
    )
    reference_column: str | None = Field(
        None,
        min_length=1,
        description="Column of the held-out prompts that holds a reference answer, text or one assistant message: "
        "its perplexity is measured.",
    )
    features: str | None = Field(
        None,
        description="CLIPModel by which held-out images are compared, a folder, hub name or 'starter': their variety "
        "and how far they went from the start's.",
    )
    kl: bool = Field(True, description="Estimate the KL to the start model, where the family knows likelihoods.")

    @property
    def metric_names(self) -> tuple[str, ...]:
        """One name for each metric of your own, in order, all different."""
        return unique_names([(each.name or derived_name(each.spec), each.name is not None) for each in self.metrics])
