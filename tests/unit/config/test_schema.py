"""The JSON schema of the configuration accepts what raftune reads, so that an editor marks only mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raftune.config import RunConfig, validate
from raftune.config.load import merge
from raftune.errors import ConfigError

SCHEMA = RunConfig.model_json_schema()
FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("*/run.yaml")])
BASE: dict[str, Any] = {"policy": {"model": "gpt2"}, "data": {"prompts": "prompts.jsonl"}}
ACCEPTED: list[dict[str, Any]] = [
    {"rewards": {"reward_funcs": "rewards.py:polite"}},
    {"rewards": {"reward_funcs": {"spec": "length", "options": {"target": 20}}}},
    {"rewards": {"reward_funcs": ["length", {"spec": "repetition", "weight": 0.5}]}},
    {"evaluation": {"reward_funcs": ["judge.py:judge"], "metrics": ["metrics.py:Words", {"spec": "metrics.py:Rare"}]}},
    {"engine": "engine.py:Cluster"},
    {"engine": {"kind": "engine.py:Cluster", "options": {"hosts": 2}}},
    {"sampling": {"backend": "hf_generate"}},
    {"sampling": {"backend": {"kind": "backend.py:Fast", "options": {"level": 2}}}},
    {"guards": {"stop_on": "cut_off"}},
    {"data": {"columns": "prompt=question"}},
    {"data": {"columns": {"prompt": "question"}}},
    {"selection": {"min_length": 3}},
    {"selection": {"rule": "top_fraction", "keep_fraction": 0.5}},
    {"training": {"objective": "loss.py:Mine", "options": {"scale": 2}}},
]
REFUSED: list[dict[str, Any]] = [
    {"rewards": {"reward_funcs": [3]}},
    {"rewards": {"reward_funcs": {"weight": 1.0}}},
    {"evaluation": {"metrics": ["words"]}},
    {"engine": "cluster"},
    {"sampling": {"backend": {"kind": "backend.py:Fast", "level": 2}}},
    {"sampling": "hf_generate"},
    {"guards": {"stop_on": "everything"}},
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_recipe_fits_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMA)


@pytest.mark.parametrize("section", ACCEPTED, ids=str)
def test_every_form_that_is_read_fits_the_schema(section: dict[str, Any]) -> None:
    validate(merge([BASE, section]))
    jsonschema.validate(merge([BASE, section]), SCHEMA)


@pytest.mark.parametrize("section", REFUSED, ids=str)
def test_what_is_refused_does_not_fit_the_schema(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate(merge([BASE, section]))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merge([BASE, section]), SCHEMA)
