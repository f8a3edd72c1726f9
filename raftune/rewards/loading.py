"""Loads a reward from a spec or an object. A function given as a spec runs in its own process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from raftune.config.rewards import RewardsConfig, RewardSpec, unique_names
from raftune.config.secrets import advice, plain_secrets
from raftune.errors import ConfigError
from raftune.protocols import Reward
from raftune.rewards.function import FunctionReward
from raftune.rewards.panel import RewardSet
from raftune.rewards.registry import BUILT_IN, import_all
from raftune.rewards.resolve import is_function, resolve

import_all()


def load_reward(
    reward: RewardSpec | str | Callable[..., Any],
    *,
    name: str | None = None,
    tokenizer: Any = None,
    timeout: float = 120.0,
    device: str = "auto",
) -> Reward:
    """The reward that a spec or an object stands for, ready to be called.

    Functions given as a spec run in a process of their own (ProcessReward), objects in this one. `tokenizer` belongs to
    a model given as an object. Raises ConfigError for a spec or options that cannot be meant, RewardError for code or a
    model that cannot be loaded.
    """
    if isinstance(reward, str):
        reward = RewardSpec.model_validate(reward)
    if not isinstance(reward, RewardSpec):
        return _from_object(reward, name, tokenizer, device)
    spec = reward if name is None else reward.model_copy(update={"name": name})
    if is_function(spec.spec) or (spec.spec in BUILT_IN and BUILT_IN[spec.spec].own_process):
        from raftune.rewards.process.client import ProcessReward

        return ProcessReward(spec, spec.timeout or timeout)
    return resolve(spec, device)


def load_panel(
    config: RewardsConfig,
    objects: Sequence[Callable[..., Any]] = (),
    *,
    weights: Sequence[float] | None = None,
    tokenizers: Sequence[Any] | None = None,
) -> RewardSet:
    """The panel of the configured rewards and, after them, of those given as objects.

    `weights` and `tokenizers` belong to the objects, one each. Whatever was started is ended again on an error.
    """
    tokenizers = list(tokenizers) if tokenizers is not None else [None] * len(objects)
    if len(tokenizers) != len(objects):
        raise ConfigError(
            f"reward_processing_classes must match reward_funcs; got {len(tokenizers)} for {len(objects)} rewards"
        )
    rewards: list[Reward] = []
    try:
        for spec in config.reward_funcs:
            rewards.append(load_reward(spec, timeout=config.timeout, device=config.device))
        for item, tokenizer in zip(objects, tokenizers, strict=True):
            rewards.append(load_reward(item, tokenizer=tokenizer, timeout=config.timeout, device=config.device))
        fixed = [spec.name is not None for spec in config.reward_funcs] + [False] * len(objects)
        return RewardSet(
            rewards,
            names=unique_names(list(zip((reward.name for reward in rewards), fixed, strict=True))),
            weights=[spec.weight for spec in config.reward_funcs]
            + list(weights if weights is not None else [1.0] * len(objects)),
            thresholds=[(spec.at_least, spec.at_most) for spec in config.reward_funcs] + [(None, None)] * len(objects),
            combine=config.combine,
            timeouts=[spec.timeout or config.timeout for spec in config.reward_funcs] + [config.timeout] * len(objects),
            batch_size=config.batch_size,
            retries=config.retries,
            notes=secrets_in(config),
        )
    except BaseException:
        for reward in rewards:
            getattr(reward, "close", lambda: None)()
        raise


def secrets_in(config: RewardsConfig) -> tuple[str, ...]:
    """What to tell of keys and passwords that stand in the options in plain."""
    options = {str(number): spec.options for number, spec in enumerate(config.reward_funcs)}
    fields = [f"reward_funcs.{field}" for field in plain_secrets(options)]
    return (advice(fields),) if fields else ()


def _from_object(reward: Any, name: str | None, tokenizer: Any, device: str) -> Reward:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(reward, torch.nn.Module):
        return _of_object(reward, tokenizer, name, device)
    if all(hasattr(reward, attribute) for attribute in ("name", "media", "fingerprint")) and callable(reward):
        own: Reward = reward
        return own
    return FunctionReward(reward, name)


def _of_object(model: Any, processor: Any, name: str | None, device: str) -> Reward:
    """The reward that a torch module is: a CLIPModel with its processor, or a classifier with its tokenizer."""
    if getattr(getattr(model, "config", None), "model_type", None) == "clip":
        from raftune.rewards.builtin.clip import ClipModel
        from raftune.rewards.builtin.clip_score import ClipScoreReward
        from raftune.rewards.builtin.model_options import ClipScoreOptions

        options = ClipScoreOptions(model=getattr(model.config, "_name_or_path", "") or "clip_score")
        return cast(Reward, ClipScoreReward(options, name=name, clip=ClipModel(model, device, processor=processor)))
    from raftune.rewards.builtin.classifier import ClassifierReward

    return cast(Reward, ClassifierReward(None, model=model, tokenizer=processor, name=name, device=device))
