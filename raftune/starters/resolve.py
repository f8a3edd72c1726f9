"""Resolves the word `starter` in a configuration to the bundled files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.config.run import RunConfig
from raftune.errors import ConfigError
from raftune.starters import image, text

WORD = "starter"
JUDGE = "starter:judge"
IMAGES = "diffusion"  # the family with the image starter; every other one has the text starter
FLOW = "starter:flow"

TEXT_REWARDS: dict[str, dict[str, Any]] = {
    WORD: {"spec": str(text.reward_path()), "name": "starter"},
    JUDGE: {"spec": "raftune.starters.text.judge:judge", "name": "judge"},
}
IMAGE_REWARDS: dict[str, dict[str, Any]] = {
    WORD: {"spec": "clip_score", "options": {"model": str(image.reward_path())}, "name": "clip_score"},
    JUDGE: {"spec": "raftune.starters.image.judge:judge", "name": "judge"},
    "starter:all_right": {"spec": "raftune.starters.image.judge:all_right", "name": "all_right"},
    "starter:aesthetic": {"spec": "aesthetic", "options": {"model": str(image.aesthetic_path())}, "name": "aesthetic"},
}


def resolve_starters(config: RunConfig) -> RunConfig:
    """The configuration with each `starter` replaced by the path or function it stands for."""
    family, policy = config.policy.family, config.policy
    evaluation, teacher = config.evaluation, config.sampling.teacher

    def rewards_of(section: Any) -> tuple[RewardSpec, ...]:
        return tuple(resolve_reward(spec, family) for spec in section.reward_funcs)

    update: dict[str, Any] = {
        "rewards": config.rewards.model_copy(update={"reward_funcs": rewards_of(config.rewards)}),
        "evaluation": evaluation.model_copy(
            update={
                "reward_funcs": rewards_of(evaluation),
                "features": str(image.reward_path()) if evaluation.features == WORD else evaluation.features,
            }
        ),
    }
    if (model := resolve_model(getattr(policy, "model", None), family)) is not None:
        update["policy"] = policy.model_copy(update={"model": model})
    if teacher is not None:
        teacher = teacher.model_copy(update={"model": resolve_model(teacher.model, family)})
        update["sampling"] = config.sampling.model_copy(update={"teacher": teacher})
    return config.model_copy(update=update)


def resolve_model(model: str | None, family: str) -> str | None:
    """The bundled policy's folder for `starter` and `starter:flow`; anything else as it is."""
    if family != IMAGES:
        return str(text.policy_path()) if model == WORD else model
    return {WORD: str(image.policy_path()), FLOW: str(image.flow_path())}.get(model or "", model)


def resolve_reward(reward: RewardSpec, family: str | None = None) -> RewardSpec:
    """The bundled reward of this word, else the reward as it is.

    Without a family a word means the text's reward, and the images' where the text has none of that name. Raises
    ConfigError for a word that begins with `starter:` and is none of the family's.
    """
    bundled_rewards = {IMAGES: IMAGE_REWARDS, None: IMAGE_REWARDS | TEXT_REWARDS}.get(family, TEXT_REWARDS)
    if (bundled := bundled_rewards.get(reward.spec)) is not None:
        options = {**reward.options, **bundled.get("options", {})}
        return reward.model_copy(update={**bundled, "options": options, "name": reward.name or bundled["name"]})
    if reward.spec.startswith(f"{WORD}:"):
        raise ConfigError(
            f"reward_funcs: of the bundled rewards {'of images ' * (family == IMAGES)}there are "
            f"{', '.join(sorted(bundled_rewards))}; got {reward.spec!r}. Name one of these."
        )
    return reward


def starter_prompts(
    source: str | None, split: Literal["train", "heldout"], family: str = "causal_lm"
) -> Callable[[], pa.Table] | None:
    """The bundled prompts of a split, where the source is `starter`: requests, or all captions of images."""
    if source != WORD:
        return None
    if family == IMAGES:
        return lambda: pa.table({"prompt": image.prompts(split, len(image.scenes(split)), seed=0)})
    size = {"train": 1024, "heldout": 256}[split]
    return lambda: pa.table({"prompt": text.prompts(split, size, seed=0)})
