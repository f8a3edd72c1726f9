"""The section `guards`: thresholds of the alarms."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from raftune.config.base import ConfigSection, OneOrMore

AlarmName = Literal[
    "held_out_falls",
    "diversity_drops",
    "length_drifts",
    "part_dominates",
    "near_duplicates",
    "kl_beyond_budget",
    "loss_diverges",
    "log_probs_mismatch",
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
    stop_on: Annotated[tuple[AlarmName, ...], OneOrMore()] = Field(
        (), description=f"Alarms that end the run after the round that raised them: {', '.join(ALARMS)}."
    )
    false_alarms: float = Field(0.01, gt=0, le=0.5)
    """held_out_falls: in (0, 0.5], maximum chance per round of a false alarm. A smaller value detects a true fall
    later."""
    diversity_drop: float = Field(0.5, gt=0, lt=1)
    """diversity_drops: in (0, 1), the relative loss of distinct-2 (of images: of their distance) of the kept samples,
    against as many generated ones of this round or of round 1."""
    length_factor: float = Field(2.0, gt=1)
    """length_drifts: above 1, the factor by which kept completions are longer or shorter than those generated in this
    round or in round 1."""
    part_share: float = Field(0.9, gt=0.5, le=1)
    """part_dominates: in (0.5, 1], the share of the score's differences within a prompt due to one reward, if the
    others differ too."""
    duplicate_rise: float = Field(0.4, gt=0, lt=1)
    """near_duplicates: in (0, 1), the share of kept completions that nearly repeat one kept for another prompt, above
    the share among those generated in round 1."""
    saturation_drift: float = Field(0.2, gt=0, lt=1)
    """saturation_drifts: in (0, 1), the change of saturation (0 … 1) of kept images against those generated in this
    round or in round 1."""
    contrast_drop: float = Field(0.5, gt=0, lt=1)
    """contrast_drops: in (0, 1), the relative loss of contrast of kept images against those generated in this round or
    in round 1."""
    max_kl: float | None = Field(None, gt=0)
    """kl_beyond_budget: KL to the initial model, nats per completion, above 0; none: more than log K per round, the
    most that best-of-K can cause, and more than max_kl_per_token."""
    max_kl_per_token: float = Field(1.0, gt=0)
    """kl_beyond_budget without max_kl: KL to the initial model, nats per token, above 0."""
    max_mismatch: float | None = Field(None, gt=0)
    """log_probs_mismatch: nats per token between recorded log-probabilities and the trainer's, above 0; none: what the
    model's arithmetic explains, from 1e-3 in float32 and 0.1 in 16 bits on."""
    loss_factor: float = Field(2.0, gt=1)
    """loss_diverges: above 1, the mean loss of a round's last steps relative to its first."""
    equal_share: float = Field(0.5, gt=0, le=1)
    """equal_scores: in (0, 1], the share of prompts whose candidates all score the same; 1 turns it off."""
    identical_share: float = Field(0.5, gt=0, le=1)
    """identical_candidates: in (0, 1], the share of prompts whose candidates are all the same; 1 turns it off."""
    empty_share: float = Field(0.2, gt=0, le=1)
    """empty_answers: in (0, 1], the share of completions without a word; 1 turns it off."""
    cut_off_share: float = Field(0.5, gt=0, le=1)
    """cut_off: in (0, 1], the share of completions that reached max_completion_length; 1 turns it off, for completions
    of fixed length."""


def thresholds(pictures: bool) -> tuple[str, ...]:
    """The dotted fields that change which alarms are raised, for images or for anything else."""
    other = ("length_factor", "empty_share", "cut_off_share") if pictures else ("saturation_drift", "contrast_drop")
    return tuple(f"guards.{n}" for n in GuardsConfig.model_fields if n not in ("enabled", "stop_on", *other))
