"""A round that has nothing to learn from leaves the policy as it was; after a few of them the run stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raftune.cli import main
from raftune.errors import ConfigError
from raftune.evaluation.history import RunOutcome, nothing_learned
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run, verify
from raftune.stages.train import nothing_to_learn
from raftune.store.parquet import write_table
from raftune.store.run import RunFolder
from tests.builders import save_tiny, tree_hash
from tests.runs import tiny

NOT_COMPARED = ("tmp", "LOCK", "events.jsonl", "environment.json", "report.html")


def rare(root: Path, **changes: Any) -> Any:
    """One sample a round, which is kept if it is the fourth or fifth answer: by this seed some rounds keep nothing."""
    base: dict[str, Any] = {
        "num_rounds": 5,
        "prompts_per_round": 1,
        "sampling": {"num_generations": 1},
        "selection": {"rule": "threshold", "threshold": 3, "all_equal": "auto"},
        "stop": {"empty_rounds": 4},
    }
    return tiny.config(root, **(base | changes))


def learned(root: Path) -> list[bool]:
    folder = RunFolder(root)
    return [not nothing_learned(folder, round_) for round_ in folder.rounds() if round_]


def compared(root: Path) -> dict[str, str]:
    return {name: value for name, value in tree_hash(root).items() if name.split("/")[0] not in NOT_COMPARED}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed") / "run"
    run(rare(root, report=True), tiny.objects())
    return root


def test_a_round_without_a_kept_sample_publishes_the_policy_before_it(mixed: Path) -> None:
    assert learned(mixed) == [False, False, True, True, False], "this seed gives rounds of both kinds"
    models = [json.loads((mixed / f"round-{r:04d}/model/policy.json").read_text()) for r in range(6)]
    for round_, moved in enumerate(learned(mixed), 1):
        assert (models[round_] == models[round_ - 1]) or moved
    assert models[0] == models[2] != models[4] == models[5]
    assert verify(mixed) == []


@pytest.mark.slow
def test_a_run_with_such_rounds_is_resumed_to_the_same_bytes(mixed: Path, tmp_path: Path) -> None:
    whole = compared(mixed)
    for last in range(1, 5):
        root = Path(shutil.copytree(mixed, tmp_path / f"run-{last}"))
        config = json.loads((root / "config.resolved.json").read_text())
        for round_ in range(last + 1, 6):
            shutil.rmtree(root / f"round-{round_:04d}")
        shutil.rmtree(root / f"round-{last:04d}/model")
        shutil.rmtree(root / f"round-{last:04d}/evaluate")
        shutil.rmtree(root / f"round-{last:04d}/guard")
        assert config["stop"]["empty_rounds"] == 4
        run(rare(root, report=True), tiny.objects())
        found = compared(root)
        assert {k for k in whole if not k.startswith("config")} == {k for k in found if not k.startswith("config")}
        assert all(found[k] == v for k, v in whole.items() if not k.startswith("config"))


def test_the_page_the_tables_and_other_decisions_know_such_rounds(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(mixed, tmp_path / "run"))
    empty = learned(root).index(False) + 1
    assert (root / "report.html").is_file()
    assert main(["report", str(root)]) == 0
    assert main(["samples", str(root), "--round", str(empty)]) == 0
    assert main(["alarms", str(root)]) == 0
    assert main(["select", str(root), "--selection.rule", "best_of_k", "--selection.threshold", "null"]) == 0
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["state"] == "finished"


def nothing(prompts: list[int], completions: list[int], **columns: Any) -> list[float | None]:
    return [None for _ in completions]


def zero(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.slow
@pytest.mark.parametrize(("reward", "reason"), [(nothing, "no usable score"), (zero, "nothing to rank")])
def test_a_run_stops_after_rounds_in_a_row_that_had_nothing_to_learn_from(
    tmp_path: Path, reward: Any, reason: str
) -> None:
    changes: dict[str, Any] = {"num_rounds": 6, "selection": {"all_equal": "auto"}}
    outcome = run(tiny.config(tmp_path / "run", **changes), tiny.objects(reward))
    assert (outcome.rounds, outcome.best) == (3, 0 if reward is zero else 3)
    assert outcome.reason.startswith("3 rounds in a row had nothing to learn from (stop.empty_rounds = 3)")
    summary = json.loads((tmp_path / "run/round-0001/select/summary.json").read_text())
    assert all(words.startswith(reason) for words in summary["empty_prompts"].values())
    assert stopped(tmp_path / "first", reward, 1, changes).rounds == 1
    assert stopped(tmp_path / "never", reward, None, changes).rounds == 6


def stopped(root: Path, reward: Any, rounds: int | None, changes: dict[str, Any]) -> RunOutcome:
    return run(tiny.config(root, **changes, stop={"empty_rounds": rounds}), tiny.objects(reward))


def test_rounds_in_between_that_learned_start_the_count_anew(mixed: Path) -> None:
    assert len(learned(mixed)) == 5
    with pytest.raises(ConfigError, match=r"stop\.empty_rounds"):
        tiny.config(mixed, stop={"empty_rounds": 0})


def test_completions_that_were_all_cut_off_leave_a_language_model_as_it_was(tmp_path: Path) -> None:
    """The start is a reference: a round's copy of it draws, is measured and exported like the start itself."""
    model = save_tiny(tmp_path / "llama", "llama")
    config: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "num_rounds": 2,
        "prompts_per_round": 2,
        "data": {"prompts": "given as an object"},
        "policy": {"model": str(model), "adapter": {"r": 2}},
        "sampling": {"num_generations": 2, "max_completion_length": 1, "generation_kwargs": {}},
        "selection": {"all_equal": "keep"},
        "training": {"mask_truncated_completions": True},
        "evaluation": {"num_prompts": 1, "num_generations": 1},
        "engine": {"threads": 1},
        "report": False,
    }
    prompts = pa.table({"prompt": [f"say {letter}" for letter in "abcdefghijkl"]})
    outcome = run(
        config, PythonObjects(train=lambda: prompts, rewards=[lambda prompts, completions, **_: [0.0] * len(prompts)])
    )
    assert outcome.rounds == 2
    folder = RunFolder(tmp_path / "run")
    assert "mask_truncated_completions" in nothing_learned(folder, 1)
    metrics = [json.loads((folder.folder(r, "evaluate") / "metrics.json").read_text()) for r in range(3)]
    assert metrics[2]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert main(["export", str(folder.root), "--round", "2", "--format", "model", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_rows_of_no_weight_and_cut_off_ones_that_are_masked_are_nothing_to_learn(tmp_path: Path) -> None:
    def why(weights: list[float], finish: list[str], masked: bool) -> str:
        write_table(pa.table({"weight": weights, "finish": finish}), tmp_path / "rows.parquet")
        return nothing_to_learn(tmp_path / "rows.parquet", masked)

    assert why([1.0, 0.0], ["length", "eos"], masked=False) == ""
    assert why([1.0, 0.5], ["length", "eos"], masked=True) == ""
    assert why([1.0, 0.0], ["length", "eos"], masked=True).startswith("all 1 kept completions were cut off")
    assert why([], [], masked=True).startswith("selection kept no sample")
