"""Rewards: functions and models that score samples, and their combination."""

from typing import TYPE_CHECKING

from raftune.lazy import exports

if TYPE_CHECKING:
    from raftune.rewards.batch import RewardBatch
    from raftune.rewards.check import CheckReport, check_reward
    from raftune.rewards.loading import load_reward, load_rewards
    from raftune.rewards.reward_set import LoggedExtras, RewardSet

__all__ = [
    "CheckReport",
    "LoggedExtras",
    "RewardBatch",
    "RewardSet",
    "check_reward",
    "load_reward",
    "load_rewards",
]

# On first use: a reward's own process starts in half the time without the rest.
__getattr__ = exports(
    __name__,
    {
        "RewardBatch": "raftune.rewards.batch",
        "CheckReport": "raftune.rewards.check",
        "check_reward": "raftune.rewards.check",
        "load_rewards": "raftune.rewards.loading",
        "load_reward": "raftune.rewards.loading",
        "LoggedExtras": "raftune.rewards.reward_set",
        "RewardSet": "raftune.rewards.reward_set",
    },
)
