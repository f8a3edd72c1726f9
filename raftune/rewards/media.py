"""Media that rewards read: text, images, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raftune.errors import ConfigError, RewardError

IMAGE_MEDIA = frozenset({"image"})
WORDS = frozenset({"text", "messages", "category"})  # what reads as a text


def is_image(value: Any) -> bool:
    """True of an image of Pillow, told by what it can do: without images Pillow need not be installed."""
    return hasattr(value, "convert")


def pictures(completions: list[Any], name: str) -> list[Any]:
    """The completions, RGB images of Pillow. Raises RewardError that names the reward where one is something else."""
    for completion in completions:
        if not is_image(completion):
            raise RewardError(
                f"reward {name!r} scores images, and a completion is of type {type(completion).__name__}. Use a "
                "reward for texts, or generate from a policy that makes images."
            )
    return [completion if completion.mode == "RGB" else completion.convert("RGB") for completion in completions]


def refuse_unfit(reads: Mapping[str, frozenset[str]], media: str) -> None:
    """Raises ConfigError where one of the rewards, each with what it reads, cannot read this medium."""
    held, other = kinds(media)
    for name in unfit(reads, media):
        raise ConfigError(f"{name} scores {other}, and was given {held}. Name a reward for {held}, or give it {other}.")


def kinds(media: str) -> tuple[str, str]:
    """What answers of this medium are called, and those of the other."""
    return ("images", "texts") if media == "image" else ("texts", "images")


def unfit(reads: Mapping[str, frozenset[str]], media: str) -> list[str]:
    """The names of the rewards that cannot read this medium."""
    return [name for name, read in reads.items() if not read & (IMAGE_MEDIA if media == "image" else WORDS)]
