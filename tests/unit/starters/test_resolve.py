"""The word `starter` stands for the bundled models wherever a model or a reward may be named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raftune.config import validate
from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError
from raftune.starters import image, text
from raftune.starters.resolve import resolve_reward, resolve_starters, starter_prompts


def test_the_starter_can_teach() -> None:
    config = validate(
        {
            "policy": {"model": "somewhere"},
            "data": {"prompts": "p.jsonl"},
            "rewards": {"reward_funcs": ["length"]},
            "sampling": {"teacher": {"model": "starter"}},
        }
    )
    teacher = resolve_starters(config).sampling.teacher
    assert teacher is not None
    assert teacher.model == str(text.policy_path())


def image_config(**sections: Any) -> dict[str, Any]:
    base = {"policy": {"family": "diffusion", "model": "starter"}, "data": {"prompts": "starter"}}
    return base | {"rewards": {"reward_funcs": ["starter"]}} | sections


def test_for_images_every_starter_is_the_image_starter() -> None:
    judged = {"prompts": "starter", "reward_funcs": ["starter:judge"], "features": "starter"}
    config = resolve_starters(validate(image_config(evaluation=judged)))
    assert getattr(config.policy, "model", None) == str(image.policy_path())
    assert config.rewards.reward_funcs[0].spec == "clip_score"
    assert config.rewards.reward_funcs[0].options["model"] == str(image.reward_path())
    assert config.evaluation.reward_funcs[0].spec == "raftune.starters.image.judge:judge"
    assert config.evaluation.features == str(image.reward_path())


def test_the_flow_matching_policy_has_a_word_of_its_own() -> None:
    config = resolve_starters(validate(image_config(policy={"family": "diffusion", "model": "starter:flow"})))
    assert getattr(config.policy, "model", None) == str(image.flow_path())


def test_options_beside_the_word_reach_the_reward() -> None:
    spec = RewardSpec(spec="starter", name="fit", options={"cosine": True})
    found = resolve_reward(spec, "diffusion")
    assert found.name == "fit"
    assert found.options == {"cosine": True, "model": str(image.reward_path())}


def test_a_word_that_only_images_have_needs_no_family() -> None:
    assert resolve_reward(RewardSpec(spec="starter:aesthetic")).options["model"] == str(image.aesthetic_path())
    assert Path(resolve_reward(RewardSpec(spec="starter")).spec) == text.reward_path()


@pytest.mark.parametrize("family", ["causal_lm", "diffusion"])
def test_an_unknown_word_is_reported_with_the_valid_ones(family: str) -> None:
    with pytest.raises(ConfigError, match=r"there are starter, .*starter:judge; got 'starter:nose'"):
        resolve_reward(RewardSpec(spec="starter:nose"), family)


def test_captions_are_all_those_of_a_split() -> None:
    train, held_out = (starter_prompts("starter", split, "diffusion") for split in ("train", "heldout"))
    assert train is not None
    assert held_out is not None
    captions = [set(table()["prompt"].to_pylist()) for table in (train, held_out)]
    assert [len(found) for found in captions] == [280, 56]
    assert not captions[0] & captions[1]
    assert starter_prompts("captions.jsonl", "train", "diffusion") is None
