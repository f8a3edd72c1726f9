"""`raftune demo`: what it refuses."""

from __future__ import annotations

import pytest

from raftune.cli import main


def test_a_demo_has_at_least_one_round(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--num-rounds", "0"]) == 2
    assert "--num-rounds must be at least 1; got 0" in capsys.readouterr().err
