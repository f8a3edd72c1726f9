"""Rewards: functions and models that score samples, and their combination."""

from typing import TYPE_CHECKING

from raftune.lazy import exports

if TYPE_CHECKING:
    from raftune.rewards.batch import RewardBatch
    from raftune.rewards.check import CheckReport, check_reward
    from raftune.rewards.loading import load_panel, load_reward
    from raftune.rewards.panel import LoggedExtras, RewardSet

__all__ = [
    "CheckReport",
    "LoggedExtras",
    "RewardBatch",
    "RewardSet",
    "check_reward",
    "load_panel",
    "load_reward",
]

# On first use: a reward's own process starts in half the time without the rest.
__getattr__ = exports(
    __name__,
    {
        "RewardBatch": "raftune.rewards.batch",
        "CheckReport": "raftune.rewards.check",
        "check_reward": "raftune.rewards.check",
        "load_panel": "raftune.rewards.loading",
        "load_reward": "raftune.rewards.loading",
        "LoggedExtras": "raftune.rewards.panel",
        "RewardSet": "raftune.rewards.panel",
    },
)
