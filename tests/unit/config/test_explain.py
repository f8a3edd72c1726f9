"""What a wrong value is answered with: the field, the choices, what was given, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

from raftune.config import ConfigSection, options_of
from raftune.config.load import models_in, nested, validate, validate_as
from raftune.config.reward_model import RewardModelConfig
from raftune.config.run import RunConfig
from raftune.config.sft import SftConfig
from raftune.errors import ConfigError

BASE: dict[str, Any] = {
    "data": {"prompts": "p.jsonl"},
    "policy": {"model": "m"},
    "rewards": {"reward_funcs": ["length"]},
}


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(BASE | changes)
    return str(caught.value)


def test_a_misspelt_choice_suggests_the_nearest() -> None:
    words = refusal(selection={"rule": "best_of_n"})
    assert words.startswith("selection.rule must be 'best_of_k', ")
    assert words.endswith("got 'best_of_n'. Did you mean 'best_of_k'?")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_rounds": True}, "num_rounds"),
        ({"training": {"learning_rate": True}}, "training.learning_rate"),
        ({"selection": {"rule": "top_m", "m": True}}, "selection.m"),
        ({"evaluation": {"num_prompts": False}}, "evaluation.num_prompts"),
    ],
)
def test_true_and_false_are_no_numbers(changes: dict[str, Any], field: str) -> None:
    assert re.fullmatch(
        rf"{field} must be a number; got (true|false), which is not one\. Write a number\.", refusal(**changes)
    )


def test_a_choice_in_a_list_is_named_by_its_field_without_a_number() -> None:
    words = refusal(guards={"stop_on": ["held_out_fall"]})
    assert words.startswith("guards.stop_on must be ")
    assert words.endswith("Did you mean 'held_out_falls'?")


def test_an_unknown_choice_is_reported_with_all_choices() -> None:
    assert refusal(keep_models="xyz").endswith("got 'xyz'. Choose one of these.")


def test_the_place_of_a_section_in_a_list_is_kept() -> None:
    words = refusal(rewards={"reward_funcs": ["length", {"spec": "regex", "weight": "heavy"}]})
    assert words.startswith("rewards.reward_funcs.1.weight must be ")


def test_a_value_where_a_section_belongs_is_reported_without_names_of_classes() -> None:
    words = refusal(sampling=3)
    assert words == ("sampling must be a section with fields of its own; got 3. Write `name: value` lines below it.")


def test_options_of_a_family_of_your_own_are_explained_like_any_field() -> None:
    class Options(ConfigSection):
        hidden: int = Field(64, ge=1)

    given: dict[str, Any] = {**BASE, "policy": {"family": "mine:Family", "options": {"hiden": 3}}}
    with pytest.raises(ConfigError, match=r"policy\.options\.hiden is not a field; did you mean 'hidden'"):
        options_of(validate(given), Options)
    given["policy"] = {"family": "mine:Family", "options": {"hidden": 0}}
    with pytest.raises(ConfigError, match=r"policy\.options\.hidden must be greater than or equal to 1; got 0"):
        options_of(validate(given), Options)
    given["policy"] = {"family": "mine:Family", "options": {"hidden": 7}}
    assert options_of(validate(given), Options).hidden == 7


def sections(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every section, however deep."""
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield (*prefix, name)
            yield from sections(inner, (*prefix, name))


@pytest.mark.parametrize("model", [RunConfig, SftConfig, RewardModelConfig])
@pytest.mark.parametrize("value", ["starter", 3, True, ["a"], [[1]], None, {"a": 1}], ids=repr)
def test_any_value_of_a_section_is_valid_or_refused_by_name(model: type[BaseModel], value: object) -> None:
    for path in dict.fromkeys(sections(model)):
        try:
            validate_as(model, nested({".".join(path): value}))
        except ConfigError as error:  # anything else would be shown as a bug
            assert path[0] in str(error) or "must be given" in str(error)


def test_a_text_for_a_section_is_reported_with_the_section_to_write() -> None:
    for section, given, written in (
        ("policy", "starter", "policy: {model: starter}"),
        ("data", "rows.jsonl", "data: {prompts: rows.jsonl}"),
        ("rewards", "length", "rewards: {reward_funcs: length}"),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"got {given!r}. Write `{written}`.")):
            validate_as(RunConfig, {section: given})
