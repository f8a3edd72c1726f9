"""The section `selection`: which of a prompt's samples are learned from, and with what weight."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raftune.config.base import Frozen

Rule = Literal["best_of_k", "top_m", "top_fraction", "threshold", "softmax", "random"]

# The rules that read each field which not every rule reads.
READ_BY: dict[str, tuple[Rule, ...]] = {
    "m": ("top_m", "random"),
    "keep_fraction": ("top_fraction",),
    "threshold": ("threshold",),
    "temperature": ("softmax",),
    "max_per_prompt": ("threshold", "top_fraction"),
}
# What a rule cannot do without, and what to write there.
_NEEDED: dict[Rule, tuple[str, str]] = {
    "top_fraction": ("keep_fraction", "Give the share of the round's samples to keep, such as 0.125."),
    "threshold": ("threshold", "Give the lowest score to keep, in the units of the summed rewards."),
    "softmax": ("temperature", "Give a number above 0 in units of the score; the smaller, the nearer to best_of_k."),
}


class SelectionConfig(Frozen):
    """What is kept of each prompt's samples. A field that the chosen rule does not read must stay at its default."""

    rule: Rule = Field(
        default="best_of_k",
        description="Who is kept: the best of each prompt (best_of_k), its m best (top_m), the best share of all "
        "(top_fraction), all from a score upwards (threshold), all weighted by score (softmax), m by chance (random).",
    )
    m: int = Field(
        default=1, description="Samples kept per prompt, at least 1 (top_m, random): more gives more, worse data."
    )
    keep_fraction: float | None = Field(
        default=None,
        description="Share in (0, 1] of all that compete (top_fraction): prompts with low scores may starve.",
    )
    threshold: float | None = Field(
        default=None,
        description="Lowest score kept, in units of the score (threshold): a prompt without one yields nothing.",
    )
    temperature: float | None = Field(
        default=None,
        description="Above 0, in units of the score (softmax): weights are softmax(score / temperature) in a prompt.",
    )
    max_per_prompt: int | None = Field(
        default=None,
        description="Most samples kept of one prompt (threshold, top_fraction): its best; none means no limit.",
    )
    all_equal: Literal["auto", "keep", "skip"] = Field(
        default="auto",
        description="Prompts whose competing samples all score the same: chosen from as any other (keep), or skipped; "
        "auto skips them where a prompt has several samples and the rule chooses among them (not threshold and "
        "top_fraction, which choose by the score itself).",
    )
    margin: float = Field(
        default=0.0,
        description="In units of the score, at least 0: prompts whose best exceeds the mean by less are skipped.",
    )
    min_length: int | None = Field(
        default=None,
        description="Shortest completion kept, in the family's unit (tokens for text); none means no limit.",
    )
    max_length: int | None = Field(
        default=None,
        description="Longest completion kept, in the family's unit (tokens for text); none means no limit.",
    )
    beta: float = Field(
        default=0.0,
        ge=0,
        description="Ranks by score - beta * log(p / p0), in units of the score per nat: keeps near the start.",
    )
    drop_duplicates: bool = Field(
        default=False,
        description="Of identical completions of a prompt only the first competes: less repetition, less data.",
    )

    @property
    def skips_equal(self) -> bool:
        """Whether a prompt of several samples that all score the same is skipped."""
        return self.all_equal == "skip" or (self.all_equal == "auto" and self.rule not in ("threshold", "top_fraction"))

    @field_validator("m", "max_per_prompt", "max_length")
    @classmethod
    def _at_least_one(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value < 1:
            raise ValueError(
                f"selection.{info.field_name} must be at least 1; got {value}. "
                "Nothing could be kept: raise it, or leave it out."
            )
        return value

    @field_validator("min_length")
    @classmethod
    def _not_negative(cls, value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError(f"selection.min_length must be at least 0; got {value}. Leave it out for no limit.")
        return value

    @field_validator("keep_fraction")
    @classmethod
    def _is_a_share(cls, value: float | None) -> float | None:
        if value is None or 0 < value <= 1:
            return value
        fix = f"It is a fraction, not a percentage: write {value / 100:g}." if 1 < value <= 100 else "Write 0.125, say."
        raise ValueError(f"selection.keep_fraction must be in (0, 1]; got {value:g}. {fix}")

    @field_validator("temperature")
    @classmethod
    def _is_positive(cls, value: float | None) -> float | None:
        if value is not None and value <= 0:
            raise ValueError(
                f"selection.temperature must be above 0; got {value:g}. Its limit at 0 is selection.rule: best_of_k."
            )
        return value

    @field_validator("margin")
    @classmethod
    def _is_a_distance(cls, value: float) -> float:
        if value < 0:
            raise ValueError(
                f"selection.margin must be at least 0; got {value:g}. No best is below its mean: write 0 for none."
            )
        return value

    @model_validator(mode="after")
    def _rule_reads_what_is_given(self) -> Self:
        for name, rules in READ_BY.items():
            value = getattr(self, name)
            if self.rule not in rules and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"selection.{name} is read by {' and '.join(rules)} only; got {name}={value} with "
                    f"rule={self.rule}, which would ignore it. Remove it, or write selection.rule: {rules[0]}."
                )
        name, fix = _NEEDED.get(self.rule, ("rule", ""))
        if getattr(self, name) is None:
            raise ValueError(f"selection.{name} must be given for rule {self.rule}; got none. {fix}")
        return self

    @model_validator(mode="after")
    def _something_can_be_kept(self) -> Self:
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"selection.min_length must not exceed selection.max_length; got {self.min_length} and "
                f"{self.max_length}, which can never select anything. Swap them, or leave one out."
            )
        return self
