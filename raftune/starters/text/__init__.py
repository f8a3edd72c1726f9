"""The bundled text starter: a small assistant, a reward model, a judge, prompts. Imports no torch."""

from pathlib import Path
from typing import Final

from raftune.starters.text.corpus import as_prompt, prompts
from raftune.starters.text.judge import judge

__all__ = ["SHOW", "judge", "policy_path", "prompts", "reward_path"]

SHOW: Final = tuple(
    as_prompt(request)
    for request in (
        "What is wrong with my phone?",
        "Help me plan a birthday party.",
        "Hello! How do I get to the market?",
    )
)
"""Three held-out prompts whose replies a demonstration shows before and after."""

WEIGHTS: Final = Path(__file__).parent / "weights"


def policy_path() -> Path:
    """The folder of the starting policy: `AutoModelForCausalLM` and `AutoTokenizer` load it."""
    return WEIGHTS / "policy"


def reward_path() -> Path:
    """The folder of the reward model: `AutoModelForSequenceClassification` with one label loads it."""
    return WEIGHTS / "reward"
