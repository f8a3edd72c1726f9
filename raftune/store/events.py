"""The event log: times, hosts, memory and retries, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL = 1 << 16  # bytes, in which the last event lies


class EventLog:
    """Appends to `events.jsonl`. A line that a kill cut short is skipped when reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = True

    def add(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts}, ensure_ascii=False, default=str)
        torn = self._fresh and self.path.exists() and not self._ends_in_newline()
        self._fresh = False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue

    def last(self) -> dict[str, Any]:
        """The last event, read from the end of the file; empty without one."""
        if not self.path.is_file():
            return {}
        with self.path.open("rb") as file:
            file.seek(max(0, self.path.stat().st_size - _TAIL))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError):
                if isinstance(event := json.loads(line), dict):
                    return event
        return {}

    def _ends_in_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(0, 2)
            if file.tell() == 0:
                return True
            file.seek(-1, 2)
            return file.read(1) == b"\n"
