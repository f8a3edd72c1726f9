"""Each built-in reward is declared once, and `raftune reward list` and docs/rewards.md say what is declared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raftune.cli import main
from raftune.config.extensions import with_options
from raftune.errors import ConfigError, RewardError
from raftune.rewards.loading import load_reward
from raftune.rewards.registry import built_in

DOCS = Path(__file__).parents[4] / "docs"


@pytest.mark.parametrize("name", sorted(built_in()))
def test_the_example_of_a_built_in_reward_works_and_every_option_says_what_it_means(name: str) -> None:
    reward = built_in()[name]
    given = with_options(reward, name, "options", dict(reward.example))
    for key, value in reward.example.items():
        assert getattr(given, key) == (tuple(value) if isinstance(value, list) else value)
    assert [option.name for option in reward.option_list() if not option.meaning] == []
    assert [
        option.name for option in reward.option_list() if option.required and option.name not in reward.example
    ] == []


def test_the_list_as_json_has_name_type_default_and_meaning_of_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "list", "--json"]) == 0
    listed = {reward["name"]: reward for reward in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(built_in())
    options = {option["name"]: option for option in listed["regex"]["options"]}
    assert options["pattern"]["required"] and options["pattern"]["type"] == "text"
    assert (options["match"]["default"], options["match"]["type"]) == (1.0, "number")
    assert options["mode"]["type"] == "search | fullmatch | count"
    assert listed["length"]["example"] == {"spec": "length", "options": {"target": 20}}
    assert "name" not in {option["name"] for reward in listed.values() for option in reward["options"]}


def test_the_page_of_rewards_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "list", "--markdown"]) == 0
    assert (DOCS / "rewards.md").read_text(encoding="utf-8") == capsys.readouterr().out, (
        "run: raftune reward list --markdown > docs/rewards.md"
    )


def test_a_reward_that_is_misspelt_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no reward 'lenght'; did you mean 'length'.*raftune reward list"):
        load_reward("lenght")
    assert main(["reward", "list", "colur"]) == 2
    assert "did you mean 'colour'" in capsys.readouterr().err


def test_a_guessed_name_is_reported_in_one_sentence_that_points_to_the_list() -> None:
    with pytest.raises(RewardError) as error:
        load_reward("politeness")
    said = str(error.value)
    assert "no reward 'politeness'" in said and "raftune reward list" in said
    assert len(said) < 250 and "https" not in said and "Check your internet connection" not in said


def test_a_built_in_reward_is_checked_with_the_options_of_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", "check", "length"]) == 0
    assert 'with the options of its example: {"target": 20}' in capsys.readouterr().out
