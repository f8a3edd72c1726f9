"""All exceptions that raftune raises deliberately.

A message names the field, the rule, what was given, and the fix, in one or two lines. Exit codes of the command line:
2 for ConfigError and DataError, 3 for GateFailed, 130 for Interrupted, 1 for all others.
"""

from __future__ import annotations


class RaftuneError(Exception):
    """The base of all errors meant for the user: shown without a traceback, `exit_code` the command's."""

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
    """A prompt or completion has more tokens than allowed."""


class ModelError(RaftuneError):
    """A model or tokenizer cannot be loaded, or its weights cannot be used."""


class NotFinite(ModelError):
    """A loss, a gradient or a trained weight is NaN or infinite: of several processes, every one raises it."""


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
    """A check that the user requested did not pass."""

    exit_code = 3


class Interrupted(RaftuneError):
    """The run stopped on request (SIGINT or SIGTERM) and can be resumed."""

    exit_code = 130
