"""How rewards are declared."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from raftune.config.rewards import RewardsConfig, RewardSpec


def test_a_plain_string_is_a_spec() -> None:
    config = RewardsConfig(reward_funcs=("length", {"spec": "regex", "weight": 2.0, "options": {"pattern": "a"}}))
    assert config.reward_funcs[0] == RewardSpec(spec="length")
    assert config.reward_funcs[1].weight == 2.0
    assert RewardsConfig(reward_funcs={"spec": "length"}) == RewardsConfig(reward_funcs=("length",))
    assert RewardsConfig(reward_funcs="length") == RewardsConfig(reward_funcs=("length",))


def test_names_come_from_the_function_the_folder_or_the_last_part_of_a_hub_name() -> None:
    specs = ("my/file.py:polite", "trl.rewards:make()", "org/model-7B", "./folder/rm/", r"C:\rewards\f.py:g")
    assert RewardsConfig(reward_funcs=specs).names == ("polite", "make", "model-7B", "rm", "g")


def test_derived_names_give_way_and_given_names_stay() -> None:
    config = RewardsConfig(reward_funcs=("a.py:f", "b.py:f", {"spec": "c.py:f", "name": "f"}, "d.py:f"))
    assert config.names == ("f_2", "f_3", "f", "f_4")


def test_two_rewards_of_one_given_name_are_refused() -> None:
    with pytest.raises(
        ValidationError, match=r"must bear different names; got 'a' twice\. Each names a column: rename one"
    ):
        RewardsConfig(reward_funcs=({"spec": "length", "name": "a"}, {"spec": "answer", "name": "a"}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"timeout": 0},
        {"name": "a/b"},
        {"name": ""},
        {"spec": ""},
        {"wieght": 1},
    ],
)
def test_a_field_out_of_its_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RewardSpec(**{"spec": "length", **wrong})


def test_declaring_and_calling_rewards_imports_no_torch() -> None:
    code = (
        "import sys; from raftune.rewards import load_rewards, RewardBatch; from raftune.config.rewards import "
        "RewardsConfig;"
        "p = load_rewards(RewardsConfig(reward_funcs=('answer',))); p.score(RewardBatch(['q'], ['1'], {'answer': "
        "['1']}));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
