"""Rewards: functions and models that score samples, and their combination."""

from raftune.rewards.batch import RewardBatch
from raftune.rewards.check import CheckReport, check_reward
from raftune.rewards.loading import load_panel, load_reward
from raftune.rewards.outcome import FailureTally, failure_message
from raftune.rewards.panel import LoggedExtras, RewardSet

__all__ = [
    "CheckReport",
    "FailureTally",
    "LoggedExtras",
    "RewardBatch",
    "RewardSet",
    "check_reward",
    "failure_message",
    "load_panel",
    "load_reward",
]
