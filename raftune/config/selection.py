"""The section `selection`: which samples of a prompt are kept, and with what weight.

Every rule has a class with its own fields; `selection.rule` chooses the class. `SelectionConfig` holds the shared
fields.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from raftune.config.base import ConfigSection, tag_of
from raftune.config.extensions import SPEC


class SelectionConfig(ConfigSection):
    """Fields of all rules: which samples compete, and which prompts are skipped."""

    within_prompt: ClassVar[bool] = True  # whether the rule compares the candidates of one prompt with each other

    rule: str
    """What is kept: the best of each prompt (best_of_k), its m best (top_m), the best share of all (top_fraction), all
    from a score upwards (threshold), all weighted by score (softmax), m at random (random), or a custom rule
    (file.py:NAME, module:NAME)."""
    all_equal: Literal["auto", "keep", "skip"] = "auto"
    """Prompts whose samples all score the same: keep selects from them, skip leaves them out; auto skips them if a
    prompt has several samples and the rule compares them with each other (not threshold and top_fraction)."""
    margin: float = Field(default=0.0, ge=0)
    """Prompts whose best exceeds the mean by less are skipped; in units of the score, at least 0."""
    min_length: int | None = Field(default=None, ge=0)
    """Shortest completion kept, in the family's unit (tokens for text); none: no limit."""
    max_length: int | None = Field(default=None, ge=1)
    """Longest completion kept, in the family's unit (tokens for text); none: no limit."""
    beta: float = Field(default=0.0, ge=0)
    """Ranks by score - beta * log(p / p0), in units of the score per nat. Keeps the policy near the initial model."""
    drop_duplicates: bool = False
    """Only the first of identical completions of a prompt competes."""

    @property
    def skips_equal(self) -> bool:
        """Whether a prompt of several samples that all score the same is skipped."""
        return self.all_equal == "skip" or (self.all_equal == "auto" and self.within_prompt)

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        """How many of `pool` candidates per prompt are kept in all, and whether it is so many if all have scores."""
        return prompts * pool, False

    @model_validator(mode="before")
    @classmethod
    def _fields_belong_to_the_rule(cls, data: Any) -> Any:
        """Refuses a field of another rule unless it is empty or at its default; names a required field."""
        if not isinstance(data, dict):
            return data
        rule = data.get("rule") or cls.model_fields["rule"].default
        fields = dict(data)
        for name in [name for name in data if name not in cls.model_fields]:
            rules = [other for other, section in RULES.items() if name in section.model_fields]
            if not rules:
                continue  # refused as an unknown field
            value = fields.pop(name)
            default = RULES[rules[0]].model_fields[name].default
            if str(value).lower() not in ("none", "null", str(default)):  # a flag's value is a text
                raise ValueError(
                    f"selection.{name} is read by {' and '.join(rules)} only; got {name}={value} with rule={rule}, "
                    f"which would ignore it. Remove it, or write selection.rule: {rules[0]}."
                )
        for name, field in cls.model_fields.items():
            if name != "rule" and field.is_required() and fields.get(name) is None:
                raise ValueError(
                    f"selection.{name} must be given for rule {rule}; got none. {field.description} Add it."
                )
        return fields

    @model_validator(mode="after")
    def _something_can_be_kept(self) -> Self:
        if self.min_length is not None and self.max_length is not None and self.min_length > self.max_length:
            raise ValueError(
                f"selection.min_length must not exceed selection.max_length; got {self.min_length} and "
                f"{self.max_length}, which can never select anything. Swap them, or leave one out."
            )
        return self


class BestOfK(SelectionConfig):
    """The best sample of each prompt."""

    rule: Literal["best_of_k"] = Field("best_of_k", description=SelectionConfig.model_fields["rule"].description)

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        return prompts, True


class TopM(SelectionConfig):
    """The m best samples of each prompt."""

    rule: Literal["top_m"] = "top_m"
    m: int = Field(1, ge=1, description="Samples kept per prompt, at least 1 (top_m, random).")

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        return prompts * min(self.m, pool), True


class TopFraction(SelectionConfig):
    """The best share of all samples of the round."""

    within_prompt: ClassVar[bool] = False
    rule: Literal["top_fraction"] = "top_fraction"
    keep_fraction: float = Field(gt=0, le=1)
    """Share in (0, 1] of all that compete (top_fraction), such as 0.125: prompts with low scores may starve."""
    max_per_prompt: int | None = Field(None, ge=1)
    """Maximum number of samples kept per prompt (threshold, top_fraction); none: no limit."""

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        return max(1, math.floor(prompts * pool * self.keep_fraction)), self.max_per_prompt is None


class Threshold(SelectionConfig):
    """All samples from a score upwards."""

    within_prompt: ClassVar[bool] = False
    rule: Literal["threshold"] = "threshold"
    threshold: float
    """Lowest score kept, in units of the score (threshold): a prompt without one yields nothing."""
    max_per_prompt: int | None = Field(None, ge=1, description=TopFraction.model_fields["max_per_prompt"].description)

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        return prompts * min(pool, self.max_per_prompt or pool), False


class Softmax(SelectionConfig):
    """All samples, weighted by their scores."""

    rule: Literal["softmax"] = "softmax"
    temperature: float = Field(gt=0)
    """Above 0, in units of the score (softmax): weights are softmax(score / temperature) in a prompt; the smaller, the
    nearer to best_of_k."""


class Random(SelectionConfig):
    """m random samples of each prompt: the control for other rules."""

    rule: Literal["random"] = "random"
    m: int = Field(1, ge=1, description=TopM.model_fields["m"].description)

    def most_kept(self, prompts: int, pool: int) -> tuple[int, bool]:
        return prompts * min(self.m, pool), True


class CustomRule(SelectionConfig):
    """A custom rule. Its class declares the options."""

    rule: str = Field(pattern=SPEC, description="file.py:NAME or module:NAME; see docs/extending.md.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of a custom rule.")


rule_class = tag_of("rule", "best_of_k")  # the key in RULES of a section's class

AnySelection = Annotated[
    Annotated[BestOfK, Tag("best_of_k")]
    | Annotated[TopM, Tag("top_m")]
    | Annotated[TopFraction, Tag("top_fraction")]
    | Annotated[Threshold, Tag("threshold")]
    | Annotated[Softmax, Tag("softmax")]
    | Annotated[Random, Tag("random")]
    | Annotated[CustomRule, Tag("custom")],
    Discriminator(rule_class),
]
RULES: dict[str, type[SelectionConfig]] = {
    tag.tag: section for section, tag in (get_args(rule) for rule in get_args(get_args(AnySelection)[0]))
}
