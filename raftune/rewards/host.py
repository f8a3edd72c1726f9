"""The process in which one reward given as a spec runs: `python -m raftune.rewards.host`, started by hosted.py.

Messages travel over copies of its standard pipes; for the reward itself, standard output leads to standard error and
standard input is empty, so that a `print` cannot corrupt a message. The process ends when its input closes, even
while the reward runs; a reward that holds the interpreter's lock is ended by a watchdog shortly after its limit.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.rewards.batch import Batch
from raftune.rewards.loading import resolve
from raftune.rewards.outcome import attempt, attempt_async, one_line
from raftune.rewards.wire import batch_from, batch_table, outcome_table, receive, send

GRACE_SECONDS = 5.0


def main() -> None:
    """Loads the reward that the first message names, then answers batch after batch."""
    inbox, outbox = _claim_pipes()
    messages: SimpleQueue[tuple[dict[str, Any], pa.Table]] = SimpleQueue()
    threading.Thread(target=_read, args=(inbox, messages), daemon=True).start()
    reward = _load(messages.get()[0], outbox)
    if reward is None:
        return
    turn = _Turn(reward)
    while True:
        header, table = messages.get()
        limit = float(header["timeout"])
        with Path(os.devnull).open("w") as nowhere:
            faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=nowhere)
            outcome = turn.take(batch_from(table, header["state"]))
            faulthandler.cancel_dump_traceback_later()
        _flush()
        send(outbox, *outcome_table(outcome))


class _Turn:
    """Calls the reward on the main thread, where time limits by signal work; async ones on one loop."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self._loop = None
        if getattr(reward, "is_async", False):
            import asyncio

            self._loop = asyncio.new_event_loop()

    def take(self, batch: Any) -> Any:
        if self._loop is None:
            return attempt(self._reward, batch)
        return self._loop.run_until_complete(attempt_async(self._reward, batch))


def _load(order: dict[str, Any], outbox: BinaryIO) -> Any:
    sys.path.extend(path for path in order["path"] if path not in sys.path)
    try:
        reward = resolve(RewardSpec.model_validate(order["spec"]))
    except BaseException as error:
        kind = "ConfigError" if isinstance(error, ConfigError) else "RewardError"
        told = (
            str(error)
            if isinstance(error, ConfigError | RewardError)
            else f"{order['spec']['spec']}: {one_line(error)}"
        )
        send(outbox, {"error": kind, "message": told})
        return None
    _warm_up()
    accepts = getattr(reward, "accepts", None)
    facts = {"name": reward.name, "fingerprint": reward.fingerprint, "media": sorted(reward.media)}
    send(
        outbox,
        {
            **facts,
            "accepts": None if accepts is None else sorted(accepts),
            "is_async": getattr(reward, "is_async", False),
        },
    )
    return reward


def _warm_up() -> None:
    """The first conversion to Arrow imports for a third of a second, which no call's time limit shall pay for."""
    batch_from(batch_table(Batch([""], [""])), {})


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return inbox, outbox


def _read(inbox: BinaryIO, messages: SimpleQueue[tuple[dict[str, Any], pa.Table]]) -> None:
    try:
        while True:
            messages.put(receive(inbox))
    except (EOFError, OSError):
        os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue


if __name__ == "__main__":
    main()
