"""Each round reaches the trackers of report_to; whoever starts late gets the whole history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

from raftune.errors import ConfigError
from raftune.runtime.run import run
from tests.runs import tiny


class Lines(accelerate.tracking.GeneralTracker):  # type: ignore[misc]
    """A real tracker of accelerate's kind, which writes JSON lines into the run."""

    name = "lines"
    requires_logging_directory = True
    main_process_only = False
    fails_at: int | None = None

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.path = Path(logging_dir) / f"{run_name}.jsonl"

    @property
    def tracker(self) -> Any:
        return self.path

    def start(self) -> None:
        self.path.write_text("")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["policy.family"] == "tabular"

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "lines", Lines)
    yield


def logged(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "lines.jsonl").read_text().splitlines()]


def test_training_samples_have_trls_names_and_held_out_ones_eval(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", report_to=["lines"]), tiny.objects())
    entries = logged(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert [entry.get("alarms") for entry in entries] == [None, 0.0, 0.0]
    assert {"reward", "reward_std", "reward_kept", "kept_fraction", "frac_reward_zero_std", "round_time"} <= set(
        entries[1]
    )
    assert {"eval_reward", "eval_reward_std", "eval_best_of_k", "eval_kl"} <= set(entries[0])
    assert "reward" not in entries[0]  # the start generated nothing to learn from


def test_the_numbers_are_those_that_were_committed(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", report_to=["lines"]), tiny.objects())
    summary = json.loads((tmp_path / "run/round-0001/select/summary.json").read_text())
    metrics = json.loads((tmp_path / "run/round-0001/evaluate/metrics.json").read_text())
    entry = logged(tmp_path / "run")[1]
    assert entry["reward"] == pytest.approx(summary["reward_generated"])
    assert entry["reward_std"] == pytest.approx(summary["reward_std"])
    assert entry["eval_reward"] == metrics["reward"]["mean"]
    assert entry["eval_kl"] == metrics["kl"]["mean"]


def test_a_tracker_that_starts_late_gets_the_whole_history(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    run(tiny.config(tmp_path / "run", report_to=["lines"], num_rounds=3), tiny.objects())
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_finished_run_starts_no_tracker(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    run(tiny.config(tmp_path / "run", report_to=["lines"]), tiny.objects())
    assert not (tmp_path / "run/lines.jsonl").exists()


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lines, "fails_at", 1)
    with pytest.warns(UserWarning, match="lines failed and is left out from now on: the server is gone"):
        outcome = run(tiny.config(tmp_path / "run", report_to=["lines"]), tiny.objects())
    assert outcome.rounds == 2
    assert [entry["step"] for entry in logged(tmp_path / "run")] == [0]


def test_a_tracker_that_cannot_start_is_refused_before_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: Lines) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(Lines, "start", start)
    with pytest.raises(ConfigError, match="report_to: lines could not be started: no API key"):
        run(tiny.config(tmp_path / "run", report_to=["lines"]), tiny.objects())
    assert not (tmp_path / "run/round-0000/model").exists()


def test_an_unknown_tracker_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"report_to must name trackers; got 'wandbb'\. There are .*wandb"):
        run(tiny.config(tmp_path / "run", report_to=["wandbb"]), tiny.objects())


def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"'tensorboard', which is not installed\. `pip install tensorboard`"):
        run(tiny.config(tmp_path / "run", report_to=["tensorboard"]), tiny.objects())


def test_none_is_no_tracker_and_all_are_those_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    assert run(tiny.config(tmp_path / "a", report_to=["none"]), tiny.objects()).rounds == 2
    assert run(tiny.config(tmp_path / "b", report_to=["all"]), tiny.objects()).rounds == 2
