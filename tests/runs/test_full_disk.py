"""A disk that is full while weights or checkpoints are written is said to be full, and costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


# A process of its own with torch, ten seconds each: nothing else writes files through torch and safetensors.
@pytest.mark.parametrize("scenario", ["full", "sft", "reward"])
def test_a_disk_that_fills_up_in_the_middle_of_a_file_is_named_and_the_work_goes_on_to_the_same_bytes(
    scenario: str,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.full_disk", scenario], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    failed = [trial for trial in found if trial["error"] != "done"]
    assert len(failed) >= 3
    for trial in failed:
        assert trial["error"] == "StoreError", trial
        assert (
            trial["words"].startswith("cannot write ") and "Free some space and run the same command" in trial["words"]
        )
    assert [trial["resumed"] for trial in found] == [True] * len(found)
