"""Rewards: functions and models that give a number to a completion, and the panel that calls several of them.

batch.py, outcome.py        what a reward is asked, and what came of the call
registry.py                 the built-in rewards by name: each declares itself by a decorator
builtin/                    the built-in rewards, one to a file
function.py                 a person's own callable
process/                    a reward in a process of its own: client, server, protocol; executors and threads
media.py                    what a reward can read
loading.py, resolve.py       spec → reward
panel.py, combining.py      samples → rewards → parts → scores
failures.py                 failures → the message for the user
files.py, picture_files.py  a person's own file, scored
check.py, examples.py       a report on one reward
"""

from raftune.rewards.batch import RewardBatch
from raftune.rewards.check import CheckReport, check_reward
from raftune.rewards.failures import FailureTally, failure_message
from raftune.rewards.loading import load_panel, load_reward
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
