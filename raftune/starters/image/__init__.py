"""The bundled image starter: two pipelines, a reward, an aesthetic head, a judge. Imports no torch."""

from pathlib import Path
from typing import Final

from raftune.starters.image.images import prompts, scenes
from raftune.starters.image.judge import all_right, judge

__all__ = ["aesthetic_path", "all_right", "flow_path", "judge", "policy_path", "prompts", "reward_path", "scenes"]

WEIGHTS: Final = Path(__file__).parent / "weights"


def policy_path() -> Path:
    """The folder of the starting policy: a StableDiffusionPipeline of 32 x 32 pixels."""
    return WEIGHTS / "policy"


def flow_path() -> Path:
    """The folder of the other policy: a StableDiffusion3Pipeline, which learns by flow matching."""
    return WEIGHTS / "flow"


def reward_path() -> Path:
    """The folder of the reward model: a CLIPModel with its tokenizer and image processor."""
    return WEIGHTS / "reward"


def aesthetic_path() -> Path:
    """The folder of a head over the reward model's picture vectors: the log odds that a picture is not spoiled."""
    return WEIGHTS / "aesthetic"
