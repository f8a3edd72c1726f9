"""A sample that its policy calls invalid is scored by nobody, kept by no rule, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.errors import DataError, ModelError, RewardError
from raftune.records import Prompt, ScoreStatus
from raftune.results.summary import columns_for, rows_of
from raftune.rewards.loading import load_rewards
from raftune.rewards.reward_set import batch_of
from raftune.runtime.run import run, verify
from tests.runs.image_family import config, objects, saturation

BROKEN = {"size": 16, "broken": 0.2, "lost": 0.1}
SKETCH_FAMILY = "tests.runs.image_family:SketchFamily"


def broken(**more: Any) -> dict[str, Any]:
    return {"policy": {"family": SKETCH_FAMILY, "options": {**BROKEN, **more}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("invalid") / "run"
    run(config(root, **broken()), objects())
    return root


def table(folder: Path, stage: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / stage).glob("chunk-*.parquet")))


def test_no_reward_is_asked_about_an_invalid_sample(tmp_path: Path) -> None:
    seen: list[int] = []

    def reward(prompts: list[str], completions: list[Any], **columns: Any) -> list[float]:
        seen.append(len(completions))
        assert all(image.mode == "RGB" and image.size == (16, 16) for image in completions)
        return saturation(prompts, completions)

    run(config(tmp_path / "run", num_rounds=1, evaluation={"num_prompts": 0}, **broken()), objects(reward))
    generated = table(tmp_path / "run/round-0001", "generate")
    assert sum(seen) == generated.column("invalid").null_count < generated.num_rows


def test_its_status_is_invalid_and_its_detail_the_policy_s_own(folder: Path) -> None:
    generated, scores = (table(folder / "round-0001", name) for name in ("generate", "score"))
    reasons = generated.column("invalid").to_pylist()
    assert {*reasons} == {None, "not finite", "flat: every pixel is the same colour"}
    for why, row in zip(reasons, scores.to_pylist(), strict=True):
        assert (row["status"], row["detail"]) == (("ok", "") if why is None else ("invalid", why))
        assert (row["score"] is None) == (row["rewards/saturation"] is None) == (why is not None)


def test_it_is_never_kept_and_its_verdict_says_why(folder: Path) -> None:
    for round_ in ("round-0001", "round-0002"):
        reasons = table(folder / round_, "generate").column("invalid").to_pylist()
        verdicts = pq.read_table(folder / round_ / "select/verdicts.parquet").to_pylist()
        for why, verdict in zip(reasons, verdicts, strict=True):
            assert (verdict["reason"] == "invalid sample") == (why is not None)
            assert why is None or verdict["weight"] == verdict["rank"] == 0
        kept = pq.read_table(folder / round_ / "rows/rows.parquet")
        assert kept.num_rows and kept.column("invalid").null_count == kept.num_rows


def test_the_share_of_invalid_samples_is_in_the_table_of_rounds(folder: Path) -> None:
    rows = rows_of(folder)
    generated = table(folder / "round-0002/evaluate", "generate").column("invalid")
    assert rows[2]["invalid"] == pytest.approx(1 - generated.null_count / len(generated))
    titles = [column.title for column in columns_for(rows)]
    assert "invalid" in titles
    summary = json.loads((folder / "round-0001/select/summary.json").read_text())
    assert summary["invalid"] == summary["reasons"]["invalid sample"] > 0


def test_invalid_samples_are_no_failures_of_a_reward(tmp_path: Path) -> None:
    """A third of the samples is invalid, and no failure at all is allowed."""
    settings = config(tmp_path / "run", num_rounds=1, rewards={"max_failure_fraction": 0.0}, **broken())
    run(settings, objects())
    assert verify(tmp_path / "run") == []


def test_failures_are_counted_among_those_that_were_asked(tmp_path: Path) -> None:
    def reward(prompts: list[str], completions: list[Any], **columns: Any) -> list[float]:
        return [float("nan") if prompt.endswith(("1", "2", "3", "4", "5")) else 1.0 for prompt in prompts]

    settings = config(tmp_path / "run", num_rounds=1, rewards={"max_failure_fraction": 0.3}, **broken())
    with pytest.raises(RewardError, match=r"of (\d+) samples could not be scored") as caught:
        run(settings, objects(reward))
    asked = table(tmp_path / "run/round-0001", "generate").column("invalid").null_count
    assert f"of {asked} samples" in str(caught.value)
    assert str(caught.value).count("nan") == 1, "what fails alike is shown once"


def test_a_round_of_invalid_samples_alone_is_refused_with_their_reasons(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", num_rounds=1, evaluation={"num_prompts": 0}, **broken(broken=0.7, lost=0.3))
    message = r"all 32 samples of the round are invalid \(\d+ flat: every pixel is the same colour, \d+ not finite\)"
    with pytest.raises(ModelError, match=message):
        run(settings, objects())


def test_an_evaluation_of_invalid_samples_alone_measures_that(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", num_rounds=0, **broken(broken=0.7, lost=0.3))
    run(settings, objects())
    metrics = json.loads((tmp_path / "run/round-0000/evaluate/metrics.json").read_text())
    assert metrics["invalid_ratio"] == 1.0
    assert metrics["reward"] is None and metrics["statuses"] == {"invalid": 24}


def test_bytes_that_are_no_image_are_reported_with_their_sample() -> None:
    with load_rewards(config(Path("x")).rewards, [saturation]) as rewards:
        samples = pa.table({"sample_id": ["s/1"], "completion": pa.array([b"no image"], pa.binary())})
        with pytest.raises(DataError, match=r"sample s/1: these 8 bytes are no image"):
            rewards.score_samples([Prompt("p", "a disc")], samples)


def test_images_wait_as_bytes_until_they_are_asked_for() -> None:
    prompts = [Prompt("p", "a disc")] * 2
    samples = pa.table({"sample_id": ["1", "2"], "completion": pa.array([b"no image"] * 2, pa.binary())})
    assert len(batch_of(prompts, samples)) == 2


def test_texts_may_be_invalid_too() -> None:
    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    samples = pa.table({"sample_id": ["1", "2", "3"], "completion": ["a", None, "ccc"], "invalid": [None, "cut", None]})
    with load_rewards(config(Path("x")).rewards, [reward]) as rewards:
        scores = rewards.score_samples([Prompt("p", "x")] * 3, samples)
    assert [score.value for score in scores] == [1.0, None, 3.0]
    assert scores[1].status is ScoreStatus.INVALID and scores[1].detail == "cut"
