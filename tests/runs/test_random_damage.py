"""Random damage to a finished run is noticed by every command that reads what was harmed: a seeded part of the trial.

python -m tests.runs.damage --trials 300        is the whole of it
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.damage import (
    CAUGHT,
    COMMANDS,
    FAULT,
    RUN,
    Damage,
    carry_out,
    clear,
    in_folder,
    judge,
    lay_out,
)

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "tabular"
    lay_out(folder, "tabular")
    return folder


@pytest.mark.parametrize("command", ["export model", "evaluate", "compare"])
@pytest.mark.parametrize(
    "file", ["best.json", "config.resolved.json", "environment.json", "round-0000/data/_COMMIT.json"]
)
def test_a_file_beside_the_rounds_that_is_gone_is_named(laid_out: Path, command: str, file: str) -> None:
    with in_folder(laid_out):
        whole, content = carry_out(COMMANDS[command]), (laid_out / RUN / file).read_bytes()
        clear()
        (laid_out / RUN / file).unlink()
        ended = carry_out(COMMANDS[command])
        clear()
        (laid_out / RUN / file).write_bytes(content)
    outcome, why = judge(Damage("delete", (file,)), command, ended, whole, mended=True)
    assert outcome != FAULT, why
