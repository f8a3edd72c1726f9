"""Random damage to a finished run is noticed by every command that reads what was harmed: a seeded part of the trial.

python -m tests.runs.damage --trials 300        is the whole of it
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.runs.damage import CAUGHT, FAULT


# A run, and then a fork for every command: fifteen seconds or so, which is what some sixty commands take.
@pytest.mark.parametrize(("kind", "trials"), [("tabular", 12), ("causal_lm", 4)])
def test_no_command_passes_over_the_damage_that_it_reads(kind: str, trials: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.damage", "--kind", kind, "--trials", str(trials), "--json", "--seed", "7"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert [trial for trial in found if trial["outcome"] == FAULT] == []
    assert sum(trial["outcome"] == CAUGHT for trial in found) >= trials // 2
