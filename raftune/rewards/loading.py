"""Loads a reward from a spec or an object. A function given as a spec runs in its own process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from raftune.config.rewards import RewardsConfig, RewardSpec, unique_names
from raftune.config.secrets import advice, plain_secrets
from raftune.errors import ConfigError
from raftune.protocols import Reward
from raftune.rewards.registry import built_in
from raftune.rewards.resolve import FunctionReward, is_function, resolve
from raftune.rewards.reward_set import RewardSet


def load_reward(
    reward: RewardSpec | str | Callable[..., Any],
    *,
    name: str | None = None,
    tokenizer: Any = None,
    timeout: float = 120.0,
    device: str = "auto",
) -> Reward:
    """The reward that a spec or an object stands for, ready to be called.

    Functions given as a spec run in their own process, objects in this one. `tokenizer` belongs to a model given as an
    object. Raises ConfigError for a wrong spec or option, RewardError for code or a model that cannot be loaded.
    """
    if isinstance(reward, str):
        reward = RewardSpec.model_validate(reward)
    if isinstance(reward, RewardSpec):
        spec = reward if name is None else reward.model_copy(update={"name": name})
        if is_function(spec.spec) or (spec.spec in built_in() and built_in()[spec.spec].own_process):
            from raftune.rewards.process.client import ProcessReward

            return ProcessReward(spec, spec.timeout or timeout)
        return resolve(spec, device)
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(reward, torch.nn.Module):
        config = getattr(reward, "config", None)
        if getattr(config, "model_type", None) == "clip":
            from raftune.rewards.builtin.clip_score import ClipScoreReward

            source = getattr(config, "_name_or_path", "") or "clip_score"
            return ClipScoreReward(model=source).load(name, device, reward, tokenizer)
        from raftune.rewards.builtin.classifier import ClassifierReward

        return ClassifierReward().load(name, device, reward, tokenizer)
    return reward if isinstance(reward, Reward) else FunctionReward(reward, name)


def load_rewards(
    config: RewardsConfig,
    objects: Sequence[Callable[..., Any]] = (),
    *,
    weights: Sequence[float] | None = None,
    tokenizers: Sequence[Any] | None = None,
) -> RewardSet:
    """The configured rewards and, after them, those given as objects, with their `weights` and `tokenizers`."""
    count, specs = len(objects), config.reward_funcs
    tokenizers = list(tokenizers) if tokenizers is not None else [None] * count
    if len(tokenizers) != count:
        raise ConfigError(
            f"reward_processing_classes must match reward_funcs; got {len(tokenizers)} for {count} rewards"
        )
    secrets = list(plain_secrets({str(number): spec.options for number, spec in enumerate(specs)}))
    rewards: list[Reward] = []
    try:
        for spec in specs:
            rewards.append(load_reward(spec, timeout=config.timeout, device=config.device))
        for item, tokenizer in zip(objects, tokenizers, strict=True):
            rewards.append(load_reward(item, tokenizer=tokenizer, timeout=config.timeout, device=config.device))
        fixed = [spec.name is not None for spec in specs] + [False] * count
        return RewardSet(
            rewards,
            names=unique_names(list(zip((reward.name for reward in rewards), fixed, strict=True))),
            weights=[*(spec.weight for spec in specs), *(weights if weights is not None else [1.0] * count)],
            thresholds=[*((spec.at_least, spec.at_most) for spec in specs), *[(None, None)] * count],
            combine=config.combine,
            timeouts=[*(spec.timeout or config.timeout for spec in specs), *[config.timeout] * count],
            batch_size=config.batch_size,
            retries=config.retries,
            notes=[advice([f"reward_funcs.{field}" for field in secrets])] if secrets else [],
        )
    except BaseException:
        for reward in rewards:
            reward.close()
        raise
