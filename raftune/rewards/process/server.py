"""Server process of one reward: `python -m raftune.rewards.process.server IN OUT`.

Messages travel over two descriptors of their own, which no child inherits. Standard output and standard error are one
pipe that the run reads, standard input is empty. The process ends when its input closes, even while the reward runs,
and what the reward started ends with it; a reward that holds the interpreter's lock is ended by a watchdog shortly
after its limit. A signal from outside ends the process: it is never an answer.
"""

from __future__ import annotations

import faulthandler
import fcntl
import itertools
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import attempt, attempt_async, one_line
from raftune.rewards.process.channel import Channel, InvalidFrame
from raftune.rewards.process.protocol import batch_from, batch_table, outcome_table, packed, unpacked
from raftune.rewards.process.spawn import MARK, end_marked
from raftune.rewards.resolve import resolve

GRACE_SECONDS = 5.0
LOWEST_DESCRIPTOR = 100  # beyond what code that closes or reuses descriptors by number usually touches


def main() -> None:
    """Loads the reward that the first message names, then answers batch after batch, each by its number."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    channel = _claim_channel()
    messages: SimpleQueue[tuple[dict[str, Any], pa.Table]] = SimpleQueue()
    threading.Thread(target=_read, args=(channel, messages), daemon=True).start()
    reward, facts = _load(messages.get()[0])
    channel.send(0, packed(facts))
    if reward is None:
        return
    turn = _Turn(reward)
    nowhere = _aside(os.open(os.devnull, os.O_WRONLY))
    for number in itertools.count(1):
        header, table = messages.get()
        limit = float(header["timeout"])
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS, exit=True, file=nowhere)
        answer = turn.take(batch_from(table, header["state"]))
        faulthandler.cancel_dump_traceback_later()
        _flush()
        channel.send(number, answer)


class _Turn:
    """Calls the reward on the main thread, where time limits by signal work; async ones on one loop."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward
        self._loop = None
        if getattr(reward, "is_async", False):
            import asyncio

            self._loop = asyncio.new_event_loop()

    def take(self, batch: RewardBatch) -> memoryview:
        """The answer to one batch as a message; that the machine failed is no answer of the reward."""
        try:
            if self._loop is None:
                outcome = attempt(self._reward, batch)
            else:
                outcome = self._loop.run_until_complete(attempt_async(self._reward, batch))
        except OSError as error:
            return packed({"machine": one_line(error)})
        return packed(*outcome_table(outcome))


def _load(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The reward and what there is to know of it; None and the error where it cannot be loaded."""
    sys.path.extend(path for path in order["path"] if path not in sys.path)
    try:
        reward = resolve(RewardSpec.model_validate(order["spec"]))
    except BaseException as error:
        known = isinstance(error, ConfigError | RewardError)
        kind = "ConfigError" if isinstance(error, ConfigError) else "RewardError"
        return None, {"error": kind, "message": str(error) if known else f"{order['spec']['spec']}: {one_line(error)}"}
    _warm_up()
    accepts = getattr(reward, "accepts", None)
    return reward, {
        "name": reward.name,
        "fingerprint": reward.fingerprint,
        "media": sorted(reward.media),
        "accepts": None if accepts is None else sorted(accepts),
        "is_async": getattr(reward, "is_async", False),
    }


def _warm_up() -> None:
    """The first conversion to Arrow imports for a third of a second, which no call's time limit shall pay for."""
    batch_from(batch_table(RewardBatch([""], [""])), {})


def _claim_channel() -> Channel:
    """The channel over copies of the descriptors that we were given: high ones, and not for processes of the reward."""
    inbox, outbox = (_aside(int(descriptor)) for descriptor in sys.argv[1:3])
    channel = Channel(inbox, outbox)
    os.register_at_fork(after_in_child=channel.close)
    return channel


def _aside(descriptor: int) -> int:
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR)
    os.close(descriptor)
    return copy


def _read(channel: Channel, messages: SimpleQueue[tuple[dict[str, Any], pa.Table]]) -> None:
    try:
        for number in itertools.count():
            messages.put(unpacked(channel.receive(number)))
    except (EOFError, OSError, InvalidFrame):
        end_marked(os.environ.get(MARK, ""))
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # a reward may have put something else in its place
            continue


if __name__ == "__main__":
    main()
