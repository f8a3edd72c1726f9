"""The section `evaluation`: measurement on held-out prompts after every round."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from raftune.config.base import ConfigSection
from raftune.config.extensions import SPEC
from raftune.config.rewards import RewardSpec, derived_name, unique_names

FEWEST_UNITS = 5  # prompts: of fewer a mean is said with their number, and without an interval


class MetricSpec(ConfigSection):
    """A custom metric. A plain string stands for a spec with every other field at its default."""

    shorthand: ClassVar[str] = "spec"
    spec: str = Field(pattern=SPEC, description="file.py:NAME or module:NAME; see docs/extending.md.")
    name: str | None = Field(None, pattern=r"^[\w.\-]+$")
    """Name metrics/NAME in metrics.json; None derives it from the spec."""
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the metric.")


class EvaluationConfig(ConfigSection):
    """Evaluation on held-out prompts, with the same seeds in every round, so rounds and runs are paired."""

    prompts: str | None = None
    """Held-out prompts, or a run's directory (its own); None: a tenth of the training prompts, at least five, is held
    out."""
    split: str = Field("test", description="Split of a hub or `datasets` folder.")
    num_prompts: int = Field(64, ge=0)
    """Maximum number of held-out prompts; 0 turns evaluation off (the last round is published)."""
    num_generations: int = Field(4, ge=1)
    """Samples per held-out prompt; best-of-k is estimated up to this k."""
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of evaluation samples, the same in every round and run.")
    reward_funcs: tuple[RewardSpec, ...] = Field((), description="Held-out rewards: reported, never trained on.")
    best_by: str = Field("reward", description="Chooses the best round: 'reward', or the name of a held-out reward.")
    metrics: tuple[MetricSpec, ...] = Field((), description="Custom metrics (file.py:NAME, module:NAME).")
    reference_column: str | None = Field(None, min_length=1)
    """Column of the held-out prompts with a reference completion, text or one assistant message; its perplexity is
    measured."""
    features: str | None = None
    """CLIPModel for diversity and drift of held-out images: a folder, hub name or 'starter'."""
    kl: bool = True
    """Estimate the KL to the initial model, if the family computes log-probabilities."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """One name for each metric of your own, in order, all different."""
        return unique_names([(each.name or derived_name(each.spec), each.name is not None) for each in self.metrics])
