"""The section `guards`: thresholds of the alarms."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raftune.config.base import ConfigSection
from raftune.config.evaluation import EvaluationConfig

AlarmName = Literal[
    "held_out_falls",
    "diversity_drops",
    "length_drifts",
    "part_dominates",
    "near_duplicates",
    "kl_beyond_budget",
    "loss_diverges",
    "equal_scores",
    "identical_candidates",
    "empty_answers",
    "cut_off",
    "saturation_drifts",
    "contrast_drops",
]
ALARMS: tuple[str, ...] = get_args(AlarmName)
ALIKE_ALARMS = ("diversity_drops", "near_duplicates", "identical_candidates")  # of texts and of images
TEXT_ALARMS = ("length_drifts", "empty_answers", "cut_off")
PICTURE_ALARMS = ("saturation_drifts", "contrast_drops")


class GuardsConfig(ConfigSection):
    """Alarms at the end of each round, with numbers and samples. An alarm stops a run only if listed in stop_on."""

    enabled: bool = Field(True, description="Check each round at its end. Needs no further samples or reward calls.")
    stop_on: tuple[AlarmName, ...] = Field(
        (), description=f"Alarms that end the run after the round that raised them: {', '.join(ALARMS)}."
    )
    false_alarms: float = Field(
        0.01,
        description="held_out_falls: in (0, 0.5], maximum chance per round of a false alarm. A smaller value detects"
        " a true fall later.",
    )
    diversity_drop: float = Field(
        0.5,
        description="diversity_drops: in (0, 1), the relative loss of distinct-2 (of images: of their distance) of "
        "the kept samples, against as many generated ones of this round or of round 1.",
    )
    length_factor: float = Field(
        2.0,
        description="length_drifts: above 1, the factor by which kept completions are longer or shorter than those "
        "generated in this round or in round 1.",
    )
    part_share: float = Field(
        0.9,
        description="part_dominates: in (0.5, 1], the share of the score's differences within a prompt due to one "
        "reward, if the others differ too.",
    )
    duplicate_rise: float = Field(
        0.4,
        description="near_duplicates: in (0, 1), the share of kept completions that nearly repeat one kept for "
        "another prompt, above the share among those generated in round 1.",
    )
    saturation_drift: float = Field(
        0.2,
        description="saturation_drifts: in (0, 1), the change of saturation (0 … 1) of kept images against those "
        "generated in this round or in round 1.",
    )
    contrast_drop: float = Field(
        0.5,
        description="contrast_drops: in (0, 1), the relative loss of contrast of kept images against those generated"
        " in this round or in round 1.",
    )
    max_kl: float | None = Field(
        None,
        description="kl_beyond_budget: KL to the initial model, nats per completion, above 0; none: more than log K "
        "per round, the most that best-of-K can cause, and more than max_kl_per_token.",
    )
    max_kl_per_token: float = Field(
        1.0, gt=0, description="kl_beyond_budget without max_kl: KL to the initial model, nats per token, above 0."
    )
    loss_factor: float = Field(
        2.0,
        description="loss_diverges: above 1, the mean loss of a round's last steps relative to its first.",
    )
    equal_share: float = Field(
        0.5,
        description="equal_scores: in (0, 1], the share of prompts whose candidates all score the same; 1 turns it "
        "off.",
    )
    identical_share: float = Field(
        0.5,
        description="identical_candidates: in (0, 1], the share of prompts whose candidates are all the same; 1 "
        "turns it off.",
    )
    empty_share: float = Field(
        0.2, description="empty_answers: in (0, 1], the share of completions without a word; 1 turns it off."
    )
    cut_off_share: float = Field(
        0.5,
        description="cut_off: in (0, 1], the share of completions that reached max_completion_length; 1 turns it "
        "off, for completions of fixed length.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_stands_for_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("stop_on"), str):
            return {**value, "stop_on": (value["stop_on"],)}
        return value

    @field_validator("false_alarms")
    @classmethod
    def _is_a_small_chance(cls, value: float) -> float:
        if not 0 < value <= 0.5:
            raise ValueError(f"guards.false_alarms must be in (0, 0.5]; got {value:g}. It is a chance: write 0.01.")
        return value

    @field_validator("diversity_drop", "duplicate_rise", "saturation_drift", "contrast_drop")
    @classmethod
    def _is_a_share(cls, value: float, info: ValidationInfo) -> float:
        if not 0 < value < 1:
            fix = (
                f"It is a fraction, not a percentage: write {value / 100:g}." if 1 < value < 100 else "Write 0.5, say."
            )
            raise ValueError(f"guards.{info.field_name} must be in (0, 1); got {value:g}. {fix}")
        return value

    @field_validator("equal_share", "identical_share", "empty_share", "cut_off_share")
    @classmethod
    def _is_a_share_or_all(cls, value: float, info: ValidationInfo) -> float:
        if not 0 < value <= 1:
            fix = f"It is a fraction, not a percentage: write {value / 100:g}." if 1 < value <= 100 else "Write 0.5."
            raise ValueError(f"guards.{info.field_name} must be in (0, 1]; got {value:g}. {fix}")
        return value

    @field_validator("part_share")
    @classmethod
    def _is_a_majority(cls, value: float) -> float:
        if not 0.5 < value <= 1:
            fix = (
                f"It is a fraction, not a percentage: write {value / 100:g}." if 1 < value <= 100 else "Write 0.9, say."
            )
            raise ValueError(f"guards.part_share must be in (0.5, 1]; got {value:g}. {fix}")
        return value

    @field_validator("length_factor", "loss_factor")
    @classmethod
    def _is_a_factor(cls, value: float, info: ValidationInfo) -> float:
        if value <= 1:
            raise ValueError(
                f"guards.{info.field_name} must be above 1; got {value:g}. It says how many times as much: write 2."
            )
        return value

    @field_validator("max_kl")
    @classmethod
    def _is_a_budget(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(
                f"guards.max_kl must be above 0; got {value:g}. Any training moves away from the start: write 10, say."
            )
        return value

    def check(self, evaluation: EvaluationConfig) -> None:
        """Raises ValueError for an alarm that is to stop the run and can never be raised, and for a vain budget."""
        if self.stop_on and not self.enabled:
            raise ValueError(
                f"guards.stop_on needs guards.enabled: true; got {', '.join(self.stop_on)} with the guards off. "
                "Turn them on, or leave out guards.stop_on."
            )
        if "held_out_falls" in self.stop_on and not (evaluation.reward_funcs and evaluation.num_prompts):
            raise ValueError(
                "guards.stop_on: held_out_falls needs a held-out reward; got no evaluation.reward_funcs or no "
                "evaluation.num_prompts. Name a reward that the policy is not trained on, or leave out held_out_falls."
            )
        if "kl_beyond_budget" in self.stop_on and not (evaluation.kl and evaluation.num_prompts):
            raise ValueError(
                "guards.stop_on: kl_beyond_budget needs evaluation.kl: true and evaluation.num_prompts above 0; got "
                "them off. Turn them on, or leave out kl_beyond_budget."
            )
        if self.max_kl is not None and not (evaluation.kl and evaluation.num_prompts):
            raise ValueError(
                "guards.max_kl needs evaluation.kl: true and evaluation.num_prompts above 0; got them off. Turn them "
                "on, or leave out guards.max_kl."
            )


def thresholds(pictures: bool) -> tuple[str, ...]:
    """The dotted fields that shape what is found, of images or of anything else; whether to stop on it does not."""
    other = ("length_factor", "empty_share", "cut_off_share") if pictures else ("saturation_drift", "contrast_drop")
    passed = ("enabled", "stop_on", *other)
    return tuple(f"guards.{name}" for name in GuardsConfig.model_fields if name not in passed)
