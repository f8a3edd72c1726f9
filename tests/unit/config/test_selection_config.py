"""The section `selection` accepts what a rule reads, refuses what it would ignore, and says how to mend it."""

import re
from typing import Any

import pytest

from raftune.config.load import validate
from raftune.config.selection import RULES
from raftune.errors import ConfigError
from tests.unit.selection_tables import selection_config

VALID: list[dict[str, Any]] = [
    {},
    {"rule": "top_m", "m": 3},
    {"rule": "top_fraction", "keep_fraction": 1, "max_per_prompt": 2},
    {"rule": "threshold", "threshold": -0.5, "max_per_prompt": 1},
    {"rule": "softmax", "temperature": 0.1},
    {"rule": "random", "m": 2},
    {"all_equal": "skip", "margin": 0.1, "min_length": 4, "max_length": 4, "drop_duplicates": True},
]
INVALID: list[tuple[dict[str, Any], str]] = [
    ({"m": 2}, "selection.m is read by top_m and random only; got m=2 with rule=best_of_k, which would ignore it"),
    ({"keep_fraction": 0.3}, "write selection.rule: top_fraction"),
    ({"rule": "softmax", "temperature": 1, "max_per_prompt": 2}, "read by top_fraction and threshold only"),
    ({"rule": "top_m", "m": 2, "threshold": 0}, "got threshold=0 with rule=top_m"),
    ({"rule": "random", "temperature": 0.5}, "selection.temperature is read by softmax only"),
    ({"rule": "top_fraction"}, "selection.keep_fraction must be given for rule top_fraction; got none"),
    ({"rule": "threshold"}, "selection.threshold must be given for rule threshold; got none"),
    ({"rule": "softmax"}, "selection.temperature must be given for rule softmax; got none"),
    (
        {"rule": "top_fraction", "keep_fraction": 30},
        "selection.keep_fraction must be less than or equal to 1; got 30. It is a fraction, not a percentage: write "
        "0.3.",
    ),
    ({"rule": "top_fraction", "keep_fraction": 0}, "selection.keep_fraction must be greater than 0; got 0."),
    ({"rule": "top_fraction", "keep_fraction": -0.5}, "selection.keep_fraction must be greater than 0; got -0.5."),
    ({"rule": "top_m", "m": 0}, "selection.m must be greater than or equal to 1; got 0"),
    (
        {"rule": "threshold", "threshold": 1, "max_per_prompt": 0},
        "selection.max_per_prompt must be greater than or equal to 1; got 0",
    ),
    ({"rule": "softmax", "temperature": 0}, "selection.temperature must be greater than 0; got 0"),
    ({"margin": -0.5}, "selection.margin must be greater than or equal to 0; got -0.5"),
    ({"min_length": -1}, "selection.min_length must be greater than or equal to 0; got -1"),
    ({"max_length": 0}, "selection.max_length must be greater than or equal to 1; got 0"),
    (
        {"min_length": 5, "max_length": 4},
        "selection.min_length must not exceed selection.max_length; got 5 and 4, which can never select anything",
    ),
    ({"rule": "threshold", "threshold": float("nan")}, "finite"),
    ({"rule": "threshold", "threshold": float("inf")}, "finite"),
    ({"rule": "top_fraction", "keep_fraction": float("nan")}, "finite"),
    ({"rule": "best"}, "best_of_k"),
    ({"top_k": 3}, "selection.top_k is not a field; did you mean 'sampling.top_k'?"),
]


@pytest.mark.parametrize("fields", VALID)
def test_what_a_rule_reads_is_accepted_and_survives_json(fields: dict[str, Any]) -> None:
    config = selection_config(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())
    assert selection_config(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(("fields", "message"), INVALID)
def test_what_cannot_be_meant_is_refused_with_its_fix(fields: dict[str, Any], message: str) -> None:
    given = {"data": {"prompts": "p.jsonl"}, "policy": {"model": "m"}, "selection": fields}
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(given)


def test_every_field_says_what_it_does() -> None:
    fields = [(name, field) for rule in RULES.values() for name, field in rule.model_fields.items()]
    assert all(field.description for name, field in fields if name != "rule")
