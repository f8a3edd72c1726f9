"""What lies beside a reward model says how it reads its text, and what its scores are normalised by."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from raftune.config.rewards import RewardSpec
from raftune.data.classifier_inputs import NOTES, write_notes
from raftune.errors import RewardError
from raftune.rewards import load_reward
from raftune.training.quiet import quiet
from tests.builders import save_tiny

NOTED = {
    "version": 1,
    "reading": {"include_prompt": True, "append_eos": True, "add_special_tokens": True, "max_length": 12},
    "distribution": {"mean": 2.0, "std": 4.0},
}
ASKED = {"prompts": ["the prompt that is long"] * 2, "completions": [" an answer", " b"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with nothing beside it."""
    folder = save_tiny(tmp_path_factory.mktemp("rm") / "rm", "llama", bos=True)
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    return folder


@pytest.fixture
def with_notes(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "noted")
    write_notes(tmp_path / "noted", NOTED)
    return tmp_path / "noted"


def made(folder: Path, **options: Any) -> Any:
    return load_reward(RewardSpec(spec=str(folder), options=options), device="cpu")


def test_what_is_recorded_is_the_default_and_options_win(plain: Path, with_notes: Path) -> None:
    as_noted = made(with_notes)(**ASKED)
    assert as_noted == made(plain, append_eos=True, add_special_tokens=True, max_length=12)(**ASKED)
    assert as_noted != made(plain)(**ASKED)
    back = made(with_notes, append_eos=False, add_special_tokens=False, max_length=128)(**ASKED)
    assert back == made(plain)(**ASKED)


def test_normalised_scores_are_those_less_the_mean_over_the_deviation(with_notes: Path) -> None:
    scores, normal = made(with_notes)(**ASKED), made(with_notes, normalize=True)(**ASKED)
    assert normal == [pytest.approx((score - 2.0) / 4.0) for score in scores]


def test_normalisation_without_a_distribution_is_refused(plain: Path, with_notes: Path) -> None:
    with pytest.raises(RewardError, match=r"options\.normalize needs the distribution of its scores"):
        made(plain, normalize=True)
    with pytest.raises(RewardError, match="must come with output: log_odds; got 'probability'"):
        made(with_notes, normalize=True, output="probability")
    write_notes(with_notes, NOTED | {"distribution": {"mean": 0.0, "std": 0.0}})
    with pytest.raises(RewardError, match=r"options\.normalize needs"):
        made(with_notes, normalize=True)


def test_the_fingerprint_follows_what_is_recorded_and_asked(plain: Path, with_notes: Path) -> None:
    asked = [made(plain), made(with_notes), made(with_notes, normalize=True), made(with_notes, append_eos=False)]
    prints = [reward.fingerprint for reward in asked]
    write_notes(with_notes, NOTED | {"reading": NOTED["reading"] | {"max_length": 13}})  # type: ignore[operator]
    assert len({*prints, made(with_notes).fingerprint}) == 5


def test_a_call_does_not_change_the_fingerprint(with_notes: Path) -> None:
    asked, fresh = made(with_notes), made(with_notes)
    before = asked(**ASKED)
    assert asked.fingerprint == fresh.fingerprint and asked(**ASKED) == before


def test_damaged_notes_are_refused_before_anything_is_scored(with_notes: Path) -> None:
    (with_notes / NOTES).write_text("{")
    with pytest.raises(RewardError, match="is damaged"):
        made(with_notes)
