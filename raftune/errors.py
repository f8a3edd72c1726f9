"""All exceptions that raftune raises deliberately.

    RaftuneError                 exit code 1
    ├── ConfigError              2   a field of the configuration is wrong
    │   └── ConfigChanged        2   the run on disk was made under another configuration
    ├── DataError                2   prompts or another data set cannot be used
    │   └── TooLong              2   a prompt leaves no room for a completion
    ├── ModelError               1   a model or tokenizer cannot be loaded, or its weights do not fit
    │   └── OutOfMemory          1   out of memory at this batch size
    ├── RewardError              1   a reward broke its contract, or failed too often
    ├── ExtensionError           1   a rule, objective or other user code failed, or broke its contract
    ├── StoreError               1   the run directory cannot be used
    │   ├── RunInUse             1   another process holds it
    │   ├── RunDamaged           1   a file on disk is not what was committed
    │   ├── RunTooNew            1   a later version of raftune wrote it
    │   └── RunTooOld            1   an earlier version with other names wrote it
    ├── EngineError              1   a worker died or a chunk failed too often
    ├── GateFailed               3   a check that was asked for did not pass
    └── Interrupted            130   stopped on request; the run can be resumed

A message names the field, the rule, what was given, and the fix, in one or two lines.
"""

from __future__ import annotations


class RaftuneError(Exception):
    """The base of all errors meant for the user: shown without a traceback."""

    exit_code = 1


class ConfigError(RaftuneError):
    """A field of the configuration breaks its rule."""

    exit_code = 2


class ConfigChanged(ConfigError):
    """The run directory holds work that another configuration made."""


class DataError(RaftuneError):
    """A data set is missing, empty, or lacks what is needed."""

    exit_code = 2


class TooLong(DataError):
    """A prompt or an answer has more tokens than it may."""


class ModelError(RaftuneError):
    """A model or tokenizer cannot be loaded, or its weights are unfit for use."""


class OutOfMemory(ModelError):
    """Out of memory with `batch_size` rows."""

    def __init__(self, message: str, batch_size: int) -> None:
        super().__init__(message)
        self.batch_size = batch_size


class RewardError(RaftuneError):
    """A reward cannot be loaded, broke its contract, or failed more often than allowed."""


class ExtensionError(RaftuneError):
    """A rule, an objective or other code that the configuration names failed, or broke its contract."""


class StoreError(RaftuneError):
    """The run directory cannot be read or written."""


class RunInUse(StoreError):
    """Another process holds the run's lock."""


class RunDamaged(StoreError):
    """A file differs from what its manifest says."""


class RunTooNew(StoreError):
    """The run was written by a later layout than this version reads."""


class RunTooOld(StoreError):
    """The run was written by an earlier version, whose stages and fields have other names."""


class EngineError(RaftuneError):
    """A worker died, or one chunk failed too often."""


class GateFailed(RaftuneError):
    """A check that the user asked for did not pass."""

    exit_code = 3


class Interrupted(RaftuneError):
    """The run stopped on request (SIGINT or SIGTERM) and can be resumed."""

    exit_code = 130
