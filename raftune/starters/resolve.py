"""The word `starter` in a configuration stands for what the package brings along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.config.run import RunConfig
from raftune.starters import text

WORD = "starter"
JUDGE = "starter:judge"


def resolve_starters(config: RunConfig) -> RunConfig:
    """The configuration with each `starter` replaced by the path or function it stands for."""
    policy, rewards, evaluation = config.policy, config.rewards, config.evaluation
    if getattr(policy, "model", None) == WORD:
        policy = policy.model_copy(update={"model": str(text.policy_path())})
    rewards = rewards.model_copy(update={"reward_funcs": tuple(map(resolve_reward, rewards.reward_funcs))})
    evaluation = evaluation.model_copy(update={"reward_funcs": tuple(map(resolve_reward, evaluation.reward_funcs))})
    sampling = config.sampling
    if sampling.teacher is not None and sampling.teacher.model == WORD:
        teacher = sampling.teacher.model_copy(update={"model": str(text.policy_path())})
        sampling = sampling.model_copy(update={"teacher": teacher})
    return config.model_copy(
        update={"policy": policy, "sampling": sampling, "rewards": rewards, "evaluation": evaluation}
    )


def resolve_reward(reward: RewardSpec) -> RewardSpec:
    specs: dict[str, dict[str, Any]] = {
        WORD: {"spec": str(text.reward_path()), "name": reward.name or "starter"},
        JUDGE: {"spec": "raftune.starters.text.judge:judge", "name": reward.name or "judge"},
    }
    return reward.model_copy(update=specs[reward.spec]) if reward.spec in specs else reward


def starter_prompts(source: str | None, split: Literal["train", "heldout"]) -> Callable[[], pa.Table] | None:
    """The bundled prompts of a split, where the source says so."""
    if source != WORD:
        return None
    size = {"train": 1024, "heldout": 256}[split]
    return lambda: pa.table({"prompt": text.prompts(split, size, seed=0)})
