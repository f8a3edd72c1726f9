"""Input and output of a reward call, in TRL's form, and which media rewards read."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from raftune.errors import ConfigError, RewardError
from raftune.protocols import Reward
from raftune.records import json_text

PASSED = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
RESERVED = PASSED | {"prompt", "completion"}  # no column reaches a reward under these names
IMAGE_MEDIA = frozenset({"image"})
TEXT_MEDIA = frozenset({"text", "messages", "category"})  # what reads as a text


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Samples side by side: every list has one entry a sample. `state` holds fields of `trainer_state`.

    Prompts are texts and completions texts, or prompts are message lists and completions
    `[{"role": "assistant", "content": …}]`; where the policy makes images, completions are RGB images of Pillow.
    """

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    completion_ids: list[list[int]] | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, indices: Sequence[int]) -> RewardBatch:
        """The samples at these indices, in this order."""
        ids = None if self.completion_ids is None else [self.completion_ids[i] for i in indices]
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        prompts, completions = [self.prompts[i] for i in indices], [self.completions[i] for i in indices]
        return RewardBatch(prompts, completions, columns, ids, self.state)


class RewardLog:
    """What one call passed to `log_metric` and `log_extra`."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(_name(name), []).append(float(value))

    def extra(self, column: str, values: list[Any]) -> None:
        """Values as JSON has them, so that every place where a reward runs logs the same."""
        plain = [
            value if value is None or type(value) in (bool, int, float) else json.loads(json_text(value))
            for value in values
        ]
        self.columns.setdefault(_name(column), []).extend(plain)


def _name(name: Any) -> str:
    """A reward may log under any name: one that is no text must not end the run."""
    return str(name).encode("utf-8", "replace").decode()


def keywords(batch: RewardBatch, log: RewardLog) -> dict[str, Any]:
    """Everything that the contract passes by keyword, as copies but for images, which FunctionReward copies."""

    def copies(values: list[Any]) -> list[Any]:
        return [copy.deepcopy(value) if isinstance(value, list | dict) else value for value in values]

    # The fields of TRL's trainer_state by which scripts shape rewards over time.
    state = SimpleNamespace(global_step=0, max_steps=0, epoch=0.0, num_train_epochs=0.0, log_history=[])
    state.__dict__.update({"is_world_process_zero": True, **batch.state})
    return {
        **{name: copies(values) for name, values in batch.columns.items() if name not in RESERVED},
        "prompts": copies(batch.prompts),
        "completions": copies(batch.completions),
        "completion_ids": None if batch.completion_ids is None else [list(ids) for ids in batch.completion_ids],
        "trainer_state": state,
        "log_extra": log.extra,
        "log_metric": log.metric,
    }


def is_image(value: Any) -> bool:
    """True for an image of Pillow, by its methods: without images Pillow need not be installed."""
    return hasattr(value, "convert")


def images(completions: list[Any], name: str) -> list[Any]:
    """The completions as RGB images of Pillow. Raises RewardError that names the reward if one is something else."""
    for completion in completions:
        if not is_image(completion):
            raise RewardError(
                f"reward {name!r} scores images, and a completion is of type {type(completion).__name__}. Use a "
                "reward for texts, or generate from a policy that makes images."
            )
    return [completion if completion.mode == "RGB" else completion.convert("RGB") for completion in completions]


def incompatible(rewards: Mapping[str, Reward], media: str) -> list[tuple[str, str, str]]:
    """The rewards by name that cannot read this medium: name, what they score, what the medium is."""
    medium, readable = ("images", IMAGE_MEDIA) if media == "image" else ("texts", TEXT_MEDIA)
    other = "texts" if media == "image" else "images"
    return [(name, other, medium) for name, reward in rewards.items() if not reward.media & readable]


def check_media(rewards: Mapping[str, Reward], media: str) -> None:
    """Raises ConfigError if one of the rewards cannot read this medium."""
    for name, scored, medium in incompatible(rewards, media):
        raise ConfigError(
            f"{name} scores {scored}, and was given {medium}. Name a reward for {medium}, or give it {scored}."
        )
