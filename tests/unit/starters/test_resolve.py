"""The word `starter` stands for the bundled models wherever a model or a reward may be named."""

from __future__ import annotations

from raftune.config import validate
from raftune.starters import text
from raftune.starters.resolve import resolve_starters


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
