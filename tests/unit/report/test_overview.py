"""The overview says in words and in charts what the rounds measured, and nothing that they did not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from raftune.report import collect
from raftune.report.collect import ChartPoint, ReportData
from raftune.report.overview import overview, worth
from raftune.store.commit import FileEntry, Manifest
from raftune.store.files import json_bytes
from raftune.store.run import RunFolder
from tests.runs import tiny

Metrics = Mapping[str, Any]


def interval(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 9}


def run_of(root: Path, *rounds: Metrics, best: int = 0, guards: Mapping[int, Any] | None = None) -> Path:
    """A run of which nothing lies on disk but what its rounds measured."""
    folder = RunFolder(root)
    root.mkdir()
    config = tiny.config(root, num_rounds=max(1, len(rounds) - 1), evaluation={"num_prompts": 4})
    folder.write_config(config.model_dump(mode="json"))
    for round_, metrics in enumerate(rounds):
        commit_json(folder, round_, "evaluate", {"metrics.json": metrics})
        commit_json(folder, round_, "model", {})
    for round_, alarms in (guards or {}).items():
        commit_json(folder, round_, "guard", {"metrics.json": {}, "alarms.json": alarms})
    (root / "best.json").write_text(json.dumps({"round": best, "by": "reward"}))
    folder.events.add("end", best=best, rounds=len(rounds) - 1, reason="it is enough")
    return root


def commit_json(folder: RunFolder, round_: int, stage: str, files: Mapping[str, Any]) -> None:
    place = folder.folder(round_, stage)
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(json_bytes(content))
    entries = {name: FileEntry.of(place / name) for name in files}
    folder.seal(Manifest(stage, round_, "key", {}, {}, entries), stage)


def sentence(data: ReportData) -> str:
    """The first sentences of the overview, as text."""
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', overview(data))
    return re.sub("<[^>]*>", "", lead)


def test_the_sentence_tells_the_best_round_the_start_and_the_alarms(tmp_path: Path) -> None:
    rounds = [
        {"reward": interval(-2.25), "held_out": interval(1.0)},
        {"reward": interval(3.36), "held_out": interval(2)},
    ]
    told = sentence(collect(run_of(tmp_path / "run", *rounds, best=1, guards={1: []})))
    assert told == (
        "In round 1 of 1, the best, the reward is 3.36, from −2.25 at the start; "
        "the held-out reward is 2.00, from 1.00 at the start. No alarm."
    )


def test_a_held_out_reward_that_was_higher_before_is_reported(tmp_path: Path) -> None:
    rounds = [{"reward": interval(n), "held_out": interval(h)} for n, h in ((0, 1.0), (1, 3.0), (2, 1.2))]
    assert "(3.00 at its highest, in round 1)" in sentence(collect(run_of(tmp_path / "a", *rounds, best=2)))
    within = [{"reward": interval(n), "held_out": interval(h)} for n, h in ((0, 1.0), (1, 1.25), (2, 1.2))]
    assert "at its highest" not in sentence(collect(run_of(tmp_path / "b", *within, best=2)))


def test_a_start_that_no_round_was_better_than_is_reported(tmp_path: Path) -> None:
    rounds = [{"reward": interval(2.0)}, {"reward": interval(1.0)}]
    told = sentence(collect(run_of(tmp_path / "run", *rounds)))
    assert told == "No round was better than the start: the reward is 2.00. No guards checked it."


def test_where_nothing_was_measured_nothing_is_claimed(tmp_path: Path) -> None:
    found = collect(run_of(tmp_path / "run", {}, {}, best=1))
    assert "nothing was measured." in sentence(found).lower()
    assert "<svg" not in overview(found)


def charts(html: str) -> list[str]:
    return re.findall(r'<figure class="chart" id="([^"]*)"', html)


def test_there_is_a_chart_of_each_thing_that_was_measured_and_of_no_other(tmp_path: Path) -> None:
    plain: Metrics = {"reward": interval(1.0)}
    full: Metrics = plain | {
        "best_of_k": {"1": interval(1.0), "2": interval(1.5), "4": interval(2.0)},
        "held_out": interval(1.0),
        "kl": interval(0.5),
        "distinct_2": 0.4,
        "msttr_100": 0.6,
        "completions/mean_length": interval(20.0),
        "completions/clipped_ratio": 0.1,
        "perplexity": interval(9.0),
        "entropy": interval(3.0),
    }
    assert charts(overview(collect(run_of(tmp_path / "plain", plain, plain)))) == ["reward"]
    names = charts(overview(collect(run_of(tmp_path / "full", full, full))))
    assert names == ["reward", "held-out", "best-of-k", "kl", "variety", "length", "cut-off", "perplexity", "entropy"]


def test_generated_is_shown_beside_selected_where_the_guards_measured_both(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", {"reward": interval(1.0)}, {"reward": interval(2.0)}, best=1)
    sets = {"generated": {"length": 20.0, "similarity": 0.1}, "selected": {"length": 30.0}}
    commit_json(RunFolder(root), 1, "guard", {"metrics.json": sets, "alarms.json": []})
    html = overview(collect(root))
    assert charts(html) == ["reward", "selected-length"]
    assert all(words in html for words in ("generated", "selected", "20.00", "30.00"))


def test_a_damaged_number_is_a_gap_and_no_crash(tmp_path: Path) -> None:
    strange: list[Metrics] = [{"reward": interval(1.0)}, {"reward": "high"}, {"reward": {"mean": None}, "kl": [1]}]
    html = overview(collect(run_of(tmp_path / "run", *strange, {"reward": interval(2.0)})))
    assert charts(html) == ["reward"]


def test_half_of_k_is_worth_its_share_of_the_gain() -> None:
    assert (
        worth({1: ChartPoint(1, 0.0), 4: ChartPoint(4, 0.93), 8: ChartPoint(8, 1.0)})
        == "At the start, K = 4 gives 93 % of the gain of K = 8."
    )


@pytest.mark.parametrize("curve", [{}, {1: 0.0}, {1: 0.0, 2: 1.0}, {1: 1.0, 2: 1.0, 4: 1.0}])
def test_of_a_curve_without_a_gain_nothing_is_reported(curve: dict[int, float]) -> None:
    assert worth({k: ChartPoint(k, mean) for k, mean in curve.items()}) == ""


def test_measured_image_metrics_are_plotted_and_others_are_not(tmp_path: Path) -> None:
    measured = {
        "saturation": interval(0.4),
        "feature_distance": interval(0.3),
        "vendi": interval(3.2),
        "feature_drift": interval(0.05),
        "near_duplicates": 0.25,
        "invalid_ratio": 0.0,
    }
    words = overview(collect(run_of(tmp_path / "run", measured, measured, best=1)))
    for title in ("Saturation and contrast", "Variety of images", "Effective number of images", "Suspicious images"):
        assert f"<b>{title}</b>" in words
    assert "<b>Drift from the start</b>" in words
    assert "<b>Brightness</b>" not in words
    assert "25.0" in words  # per cent


def test_the_time_of_a_round_is_split_by_what_it_was_spent_on(tmp_path: Path) -> None:
    root = run_of(tmp_path / "run", {"reward": interval(0)}, {"reward": interval(1)}, {"reward": interval(2)}, best=2)
    for round_ in (1, 2):
        for stage, seconds in (("generate", 4.0), ("score", 1.5), ("train", 2.25), ("evaluation generate", 0.5)):
            RunFolder(root).events.add("stage_end", round=round_, stage=stage, seconds=seconds)
    words = overview(collect(root))
    chart = words[words.index('id="seconds"') :]
    for name, seconds in (("generate", "4.000"), ("score", "1.500"), ("train", "2.250"), ("evaluate", "0.500")):
        assert f">{name}<" in chart or f"{name}</text>" in chart
        assert seconds in chart
