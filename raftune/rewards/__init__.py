"""Rewards: functions and models that give a number to a completion, and the panel that calls several of them.

batch.py, outcome.py        what a reward is asked, and what came of the call
builtin.py                  the built-in rewards by name: each declares itself by a decorator, one to a file
model_options.py            the options of those that are models
clip.py, models.py          what rewards that are models share
function.py                 a person's own callable
host.py, hosted.py, wire.py a reward in a process of its own: the far side, this side, and what travels between
places.py, runner.py        where a reward runs so that waiting for it can end
media.py                    what a reward can read
loading.py                  spec → reward
panel.py, combining.py      rewards → parts → scores
failures.py                 failures → the message for the user
samples.py                  rows of the ledger → what a reward is asked
files.py, picture_files.py  a person's own file, scored
check.py, examples.py       a report on one reward
"""

from raftune.rewards.batch import Batch
from raftune.rewards.check import CheckReport, check_reward
from raftune.rewards.failures import Failures, failure_message
from raftune.rewards.loading import load_panel, load_reward
from raftune.rewards.panel import Extras, Panel

__all__ = [
    "Batch",
    "CheckReport",
    "Extras",
    "Failures",
    "Panel",
    "check_reward",
    "failure_message",
    "load_panel",
    "load_reward",
]
