"""Random interruptions of whole runs, fine-tunings and reward trainings, torch loaded: no trace, whatever they hit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs.schedules import BROKEN

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]


def trials_of(*words: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.runs.schedules", "--json", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_whatever_interrupts_whatever_the_end_has_the_same_bytes() -> None:
    """Twelve of the schedules that `python -m tests.runs.schedules` tries."""
    found = trials_of("--trials", "12")
    assert [row["faults"] for row in found.values()] == [[]] * 4
    assert all(row["identical"] == row["trials"] == 3 for row in found.values())
    assert sum(sum(row["lives"].values()) - row["lives"].get("ended before", 0) for row in found.values()) >= 5
    assert max(row["slowest_stop"] for row in found.values()) < 20


@pytest.mark.parametrize("way", BROKEN)
def test_the_schedules_notice_what_breaks_the_promise(way: str) -> None:
    [row] = trials_of("--broken", way, "--trials", "60", "--seed", "1").values()
    assert row["faults"]
