"""Rewards: functions and models that score samples, and their combination."""

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
