"""Every recipe is a whole and valid configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftune.config.load import declared, load_config, validate
from raftune.rewards.loading import BUILT_IN, load_reward

RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "paper", "math", "toxicity"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_bears_its_files_name(path: Path) -> None:
    config = load_config([path])
    assert config.name == path.stem
    assert validate(declared(config)) == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_built_in_rewards_of_a_recipe_take_its_options(path: Path) -> None:
    config = load_config([path])
    for reward in (*config.rewards.reward_funcs, *config.evaluation.reward_funcs):
        if reward.spec in BUILT_IN:
            assert load_reward(reward).name == reward.derived_name
