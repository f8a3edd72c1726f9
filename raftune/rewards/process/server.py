"""Server process of one reward: `python -m raftune.rewards.process.server IN OUT`.

A reward that holds the interpreter's lock is ended by a watchdog shortly after its limit. A signal from outside ends
the process: it is never an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import signal
import sys
from typing import Any

from raftune.config.rewards import RewardSpec
from raftune.engines.process import move_high, serve
from raftune.errors import ConfigError, RewardError
from raftune.rewards.batch import RewardBatch
from raftune.rewards.outcome import attempt, attempt_async, one_line
from raftune.rewards.process.protocol import batch_from, packed, unpacked
from raftune.rewards.resolve import resolve

GRACE_SECONDS = 5.0


def main() -> None:
    """Loads the reward that the first message names, then scores batches on the main thread, where time limits by
    signal work."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    requests = serve()
    request, reply = next(requests)
    order, _ = unpacked(request)
    sys.path.extend(path for path in order["path"] if path not in sys.path)
    try:
        reward = resolve(RewardSpec.model_validate(order["spec"]))
    except BaseException as error:
        known = isinstance(error, ConfigError | RewardError)
        kind = "ConfigError" if isinstance(error, ConfigError) else "RewardError"
        message = str(error) if known else f"{order['spec']['spec']}: {one_line(error)}"
        reply(packed({"error": kind, "message": message}))
        return
    facts: dict[str, Any] = {name: getattr(reward, name) for name in ("name", "fingerprint", "is_async")}
    facts |= {name: sorted(getattr(reward, name)) for name in ("media", "needs")}
    reply(packed(facts | {"accepts": None if reward.accepts is None else sorted(reward.accepts)}))
    loop = asyncio.new_event_loop() if reward.is_async else None
    nowhere = move_high(os.open(os.devnull, os.O_WRONLY))
    for request, reply in requests:
        header, table = unpacked(request)
        faulthandler.dump_traceback_later(float(header["timeout"]) + GRACE_SECONDS, exit=True, file=nowhere)
        outcome = score(reward, loop, batch_from(table, header["state"]))
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a reward may have replaced it
                stream.flush()
        reply(outcome)


def score(reward: Any, loop: asyncio.AbstractEventLoop | None, batch: RewardBatch) -> memoryview:
    """The reply to one batch; a failure of the machine is no answer of the reward."""
    try:
        outcome = attempt(reward, batch) if loop is None else loop.run_until_complete(attempt_async(reward, batch))
    except OSError as error:
        return packed({"machine": one_line(error)})
    return packed(outcome.as_dict())


if __name__ == "__main__":
    main()
