"""What holds for every test: no network, few threads, no reports sent anywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from importlib import metadata

import pytest

# Before anything imports torch or a library of the hub: a limit set later would not reach them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ["COLUMNS"] = "120"  # what is printed is laid out for a terminal of this width

from raftune.store import files, run

# Tests interrupt themselves and what they start, which would not hear it where a shell started them in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Every run records ten versions, each read from a long file; they stay what they are while the tests last.
metadata.version = cache(metadata.version)

# A test may end a process but never the machine, so that what the kernel was given is kept: a sync shows nothing, and
# a tiny run would wait for the disk a hundred times. Replaced before anybody else imports it by its name.
_sync = files.sync
files.sync = run.sync = lambda *paths: None


@pytest.fixture(scope="module")
def synced() -> Iterator[None]:
    """The store syncs as it does for its users; for tests whose claim that is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", _sync)
        patch.setattr(run, "sync", _sync)
        yield
