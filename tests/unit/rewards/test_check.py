"""The report on one reward."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from raftune.cli import main
from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError
from raftune.rewards import RewardBatch, check_reward
from raftune.rewards.check import example_batch


def lengths(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def test_a_sound_reward_is_ok_and_nothing_is_found() -> None:
    report = check_reward(lengths)
    assert report.ok
    assert report.findings == ()
    assert (report.name, report.place, report.accepts, report.samples, report.returned) == (
        "lengths",
        "thread",
        None,
        16,
        16,
    )
    assert (report.lowest, report.highest, report.statuses) == (0.0, 1000.0, {"ok": 16})
    assert report.samples_per_second > 0


def test_built_in_rewards_are_ok_on_our_own_samples() -> None:
    for spec in ("answer", "repetition", RewardSpec(spec="length", options={"max": 3, "unit": "tokens"})):
        assert check_reward(spec).ok
    assert check_reward("answer").statuses == {"ok": 12, "not_applicable": 4}


def test_a_reward_in_its_own_process_is_checked_there() -> None:
    report = check_reward(RewardSpec(spec="regex", options={"pattern": "[0-9]"}))
    assert (report.place, report.ok, report.statuses) == ("process", True, {"ok": 16})


def test_the_keywords_that_a_reward_takes_are_listed() -> None:
    report = check_reward(lambda completions, answer: [1.0 * (a is None) for a in answer])
    assert report.accepts == ("answer", "completions")
    assert report.findings[0].startswith("takes only answer, completions: other columns do not reach it")


def test_a_random_reward_is_not_deterministic() -> None:
    dice = random.Random(1)
    report = check_reward(lambda completions, **kwargs: [dice.random() for _ in completions])
    assert (report.deterministic, report.ok) == (False, False)
    assert any("other values when asked again" in found for found in report.findings)


def test_a_reward_that_ranks_within_its_batch_depends_on_the_order() -> None:
    report = check_reward(lambda completions, **kwargs: [float(i) for i in range(len(completions))])
    assert (report.deterministic, report.order_independent, report.ok) == (True, False, False)
    assert report.largest_order_change is not None
    assert report.largest_order_change > 0.1


def test_failing_samples_are_counted_and_shown() -> None:
    report = check_reward(lambda completions, **kwargs: [float("nan") if not text else 1.0 for text in completions])
    assert report.statuses == {"ok": 15, "invalid": 1}
    assert not report.ok
    assert [(bad.index, bad.status, bad.detail) for bad in report.failing] == [
        (1, "invalid", "returned nan, not a finite number")
    ]
    assert "gives every sample the same value: there is nothing to rank" in report.findings


def test_a_wrong_length_is_reported_with_both_numbers() -> None:
    report = check_reward(lambda completions, **kwargs: [1.0])
    assert (report.returned, report.samples) == (1, 16)
    assert "returns 1 values for 16 completions: it must return one for each" in report.findings


def test_a_reward_that_raises_or_hangs_is_reported_and_not_judged_further() -> None:
    def raises(**kwargs: Any) -> Any:
        raise KeyError("x")

    report = check_reward(raises)
    assert (report.statuses, report.deterministic, report.order_independent, report.ok) == (
        {"error": 16},
        None,
        None,
        False,
    )
    hang = check_reward(lambda completions, **kwargs: time.sleep(5), RewardBatch(["q"], ["a"]), timeout=0.1)
    assert hang.statuses == {"timeout": 1}


def test_async_rewards_are_checked_on_their_loop() -> None:
    async def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    assert (check_reward(reward).place, check_reward(reward).ok) == ("loop", True)


def test_what_cannot_be_loaded_raises() -> None:
    with pytest.raises(ConfigError, match="did you mean 'length'"):
        check_reward("lenght")


def test_our_own_samples_have_every_column_in_full() -> None:
    batch = example_batch()
    assert (
        len(
            {
                len(values)
                for values in (batch.prompts, batch.completions, batch.completion_ids, *batch.columns.values())
            }
        )
        == 1
    )


@pytest.mark.slow
def test_the_command_names_a_failure_once_hints_at_images_and_calls_no_constant_fine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text(
        "def size(completions, **kwargs):\n    return [image.width for image in completions]\n"
        "def same(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    assert main(["reward", "check", f"{tmp_path / 'rewards.py'}:size"]) == 3
    said = capsys.readouterr()
    assert (said.out + said.err).count("AttributeError") == 1
    assert "(rewards.py, line 2)" in said.out + said.err
    assert "--images" in said.out + said.err
    assert main(["reward", "check", f"{tmp_path / 'rewards.py'}:same"]) == 0
    said = capsys.readouterr()
    assert (said.out + said.err).startswith("same: scores all samples the same\n")
