"""Claims about the starter's feedback: labels that err as they are said to, and a function of the seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raftune.cli import main
from raftune.config import load_config
from raftune.data.feedback import read_preferences, read_ratings
from raftune.starters.text import judge
from raftune.starters.text.corpus import read_request
from raftune.starters.text.preferences import NOISE, RATING_ERROR, preferences, ratings, with_references

N = 2000


@pytest.mark.slow
def test_one_preference_in_twenty_is_turned_round() -> None:
    """A binomial of 2000 with p = 0.05 is off by 0.025, five deviations, with probability < 1e-6; the seed is fixed."""
    rows = preferences("train", N, seed=1)
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (np.array(judge(prompts, [row[name] for row in rows]), float) for name in ("chosen", "rejected"))
    assert (chosen != rejected).all()
    assert abs((chosen < rejected).mean() - NOISE) < 0.025


def test_a_rating_is_the_judges_score_with_an_error_inside_its_range() -> None:
    rows = ratings("train", 1000, seed=1)
    given = np.array([row["score"] for row in rows])
    true = np.array(judge([row["prompt"] for row in rows], [row["completion"] for row in rows]), float)
    assert given.min() >= 0 and given.max() <= 4
    inside = (true > 4 * RATING_ERROR) & (true < 4 - 4 * RATING_ERROR)
    assert np.std((given - true)[inside]) == pytest.approx(RATING_ERROR, abs=0.05)


def test_the_rows_are_a_function_of_the_seed() -> None:
    assert preferences("train", 20, seed=3) == preferences("train", 20, seed=3)
    assert preferences("train", 20, seed=3) != preferences("train", 20, seed=4)


def test_held_out_requests_are_in_no_training_row() -> None:
    learned = {read_request(row["prompt"]) for row in [*preferences("train", 500), *ratings("train", 1000)]}
    held_out = {read_request(row["prompt"]) for row in with_references("heldout", 128)}
    assert None not in learned | held_out
    assert not learned & held_out


def test_a_reference_is_a_good_completion() -> None:
    rows = list(with_references("heldout", 128))
    assert np.mean(judge([r["prompt"] for r in rows], [r["reference"] for r in rows])) > 3.5


def test_the_command_writes_files_that_the_readers_and_a_run_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's # here"
    assert main(["starter", str(folder), "--rows", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["preferences.jsonl"] == 30
    assert len(read_preferences(str(folder / "preferences.jsonl")).rows) == 30
    assert len(read_ratings(str(folder / "ratings.jsonl"), low=0, high=4).rows) == 30
    run = load_config([folder / "run.yaml"])
    assert Path(run.data.prompts) == folder / "prompts.jsonl"
    assert run.output_dir == str(folder / "run")
    assert main(["starter", str(folder)]) == 2
    assert "must be empty, or not exist yet" in capsys.readouterr().err
