"""The tabular family with units that can be told to fail, in every way in which a chunk can."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from raftune.errors import DataError
from raftune.protocols import Chunk
from raftune.records import Sample
from tests.runs.tiny import Dressed

ORDERS = "RAFTUNE_TEST_ORDERS"  # not in the configuration, so that what is left of a failure can be compared


class Crashing(Dressed):
    """Orders name units: kill_always, kill_once, raise_always, hang_always, hang_once, refuse; `marks` is a folder that
    gets a file for each chunk that is begun, `gate` a file without which none goes on."""

    def generate(self, chunk: Chunk) -> list[Sample]:
        orders: dict[str, Any] = json.loads(os.environ.get(ORDERS, "{}"))
        first = mark(Path(orders["marks"]), chunk.index) if "marks" in orders else True

        def told(what: str) -> bool:
            return chunk.index in orders.get(f"{what}_always", ()) or (
                first and chunk.index in orders.get(f"{what}_once", ())
            )

        while "gate" in orders and not Path(orders["gate"]).exists():
            time.sleep(0.02)
        if told("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if told("hang"):
            time.sleep(600)
        if told("raise"):
            raise RuntimeError("broken")
        if told("refuse"):
            raise DataError(f"chunk {chunk.index} cannot be generated")
        return super().generate(chunk)


def mark(folder: Path, chunk: int) -> bool:
    """Notes that the chunk was begun; True the first time."""
    folder.mkdir(exist_ok=True)
    first = not list(folder.glob(f"{chunk}-*"))
    (folder / f"{chunk}-{uuid.uuid4().hex}").touch()
    return first
