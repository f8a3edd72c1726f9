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
IMAGES = "diffusion"  # the family whose starter is the pictures'; every other one's is the text's
FLOW = "starter:flow"


def resolve_starters(config: RunConfig) -> RunConfig:
    """The configuration with each `starter` replaced by the path or function it stands for."""
    family, policy, rewards, evaluation = config.policy.family, config.policy, config.rewards, config.evaluation
    if (model := resolve_model(getattr(policy, "model", None), family)) is not None:
        policy = policy.model_copy(update={"model": model})

    def resolved(specs: tuple[RewardSpec, ...]) -> tuple[RewardSpec, ...]:
        return tuple(resolve_reward(spec, family) for spec in specs)

    rewards = rewards.model_copy(update={"reward_funcs": resolved(rewards.reward_funcs)})
    features = str(image.reward_path()) if evaluation.features == WORD else evaluation.features
    update = {"reward_funcs": resolved(evaluation.reward_funcs), "features": features}
    evaluation = evaluation.model_copy(update=update)
    sampling = config.sampling
    if sampling.teacher is not None:
        model = resolve_model(sampling.teacher.model, family)
        sampling = sampling.model_copy(update={"teacher": sampling.teacher.model_copy(update={"model": model})})
    return config.model_copy(
        update={"policy": policy, "sampling": sampling, "rewards": rewards, "evaluation": evaluation}
    )


def resolve_model(model: str | None, family: str) -> str | None:
    """The bundled policy's folder, where it is meant; anything else as it is."""
    if family != IMAGES:
        return str(text.policy_path()) if model == WORD else model
    return {WORD: str(image.policy_path()), FLOW: str(image.flow_path())}.get(model or "", model)


def resolve_reward(reward: RewardSpec, family: str | None = None) -> RewardSpec:
    """The bundled reward of this word, else the reward as it is.

    Without a family a word means the text's reward, and the pictures' where the text has none of that name. Raises
    ConfigError for a word that begins with `starter:` and is none of the family's.
    """
    known = {IMAGES: image_rewards(), None: image_rewards() | text_rewards()}.get(family, text_rewards())
    if reward.spec in known:
        given = known[reward.spec]
        options = {**reward.options, **given.get("options", {})}
        return reward.model_copy(update={**given, "options": options, "name": reward.name or given["name"]})
    if reward.spec.startswith(f"{WORD}:"):
        raise ConfigError(
            f"reward_funcs: of the bundled rewards {'of pictures ' * (family == IMAGES)}there are "
            f"{', '.join(sorted(known))}; got {reward.spec!r}. Name one of these."
        )
    return reward


def text_rewards() -> dict[str, dict[str, Any]]:
    return {
        WORD: {"spec": str(text.reward_path()), "name": "starter"},
        JUDGE: {"spec": "raftune.starters.text.judge:judge", "name": "judge"},
    }


def image_rewards() -> dict[str, dict[str, Any]]:
    clip, aesthetic = str(image.reward_path()), str(image.aesthetic_path())
    return {
        WORD: {"spec": "clip_score", "options": {"model": clip}, "name": "clip_score"},
        JUDGE: {"spec": "raftune.starters.image.judge:judge", "name": "judge"},
        "starter:all_right": {"spec": "raftune.starters.image.judge:all_right", "name": "all_right"},
        "starter:aesthetic": {"spec": "aesthetic", "options": {"model": aesthetic}, "name": "aesthetic"},
    }


def starter_prompts(
    source: str | None, split: Literal["train", "heldout"], family: str = "causal_lm"
) -> Callable[[], pa.Table] | None:
    """The bundled prompts of a split, where the source says so: requests, or captions of pictures, all of them."""
    if source != WORD:
        return None
    if family == IMAGES:
        return lambda: pa.table({"prompt": image.prompts(split, len(image.scenes(split)), seed=0)})
    size = {"train": 1024, "heldout": 256}[split]
    return lambda: pa.table({"prompt": text.prompts(split, size, seed=0)})
