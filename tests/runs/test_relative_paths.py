"""A run whose configuration names files by relative paths goes on from anywhere, and where the project has moved to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raftune.cli import main
from raftune.results.model_card import publish_model
from raftune.runtime.run import verify
from raftune.store.run import RunFolder
from tests.builders import save_tiny
from tests.runs import damage
from tests.runs.kill import difference, tree
from tests.unit.reward_models.feedback_files import marked, write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tabular", "causal_lm"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of two rounds, made in the project's folder."""
    folder = tmp_path_factory.mktemp(request.param) / "project"
    damage.lay_out(folder, request.param)
    return folder


def started_run(project: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with a run of one round of two."""
    folder = Path(shutil.copytree(project, place / "project"))
    shutil.rmtree(folder / "runs")
    monkeypatch.chdir(folder)
    assert main(["train", "run.yaml", "--output-dir", "runs/whole", "--num-rounds", "1"]) == 0
    return folder


def test_it_is_resumed_from_another_folder_to_the_same_bytes(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = started_run(project, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "project/runs/whole", "--num-rounds", "2"]) == 0
    assert difference(tree(project / "runs/whole"), tree(folder / "runs/whole")) == ""
    assert verify(folder / "runs/whole") == []
    for command in (
        ["train", "project/run.yaml", "--output-dir", "project/runs/whole"],
        ["train", "project/runs/whole/config.yaml", "--output-dir", "project/runs/whole"],
        ["evaluate", "project/runs/whole", "--output-dir", "evaluated"],
        ["export", "project/runs/whole", "--format", "sft", "--out", "rows.jsonl"],
    ):
        assert main(command) == 0, command
    assert difference(tree(project / "runs/whole"), tree(folder / "runs/whole")) == ""


def test_it_is_resumed_where_the_whole_project_was_moved_to(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = started_run(project, tmp_path, monkeypatch)
    moved = tmp_path / "elsewhere/deeper/named otherwise"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    monkeypatch.chdir("/")
    assert main(["resume", str(moved / "runs/whole"), "--num-rounds", "2"]) == 0
    assert difference(tree(project / "runs/whole"), tree(moved / "runs/whole")) == ""
    publish_model(moved / "runs/whole", tmp_path / "out", 0)


def test_no_path_of_this_machine_is_in_a_run_that_was_given_none(project: Path) -> None:
    texts = [path for path in (project / "runs/whole").rglob("*") if path.suffix in (".json", ".yaml", ".jsonl")]
    assert [path for path in texts if str(project.parent) in path.read_text()] == []


def test_the_folder_of_the_configuration_is_on_record_beside_it(project: Path) -> None:
    run = RunFolder(project / "runs/whole")
    assert run.config_record()["folder"] == "../.."
    assert run.read_config()["data"]["prompts"] == "train.jsonl"
    content = json.loads((run.root / "config.resolved.json").read_text())
    assert {"raftune", "sha256"} <= content.keys()


def test_two_projects_in_two_folders_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `sft` and of reward training. (An adapter that `sft` writes names its base in full, for plain peft.)"""
    trees = []
    for name in ("one", "two/deeper"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_tiny(folder / "model")
        write(folder / "rows.jsonl", [{"prompt": f"ask {i % 3}", "completion": "cab"} for i in range(6)])
        write(folder / "marked.jsonl", marked(16))
        monkeypatch.chdir(folder)
        sft = ["sft", "rows.jsonl", "--policy.model", "model", "--output-dir", "sft", "--training.max_steps", "1"]
        assert main([*sft, "--policy.device", "cpu", "--threads", "1"]) == 0
        reward = ["reward", "train", "marked.jsonl", "--model", "model", "--output-dir", "rm", "--max-steps", "1"]
        assert main([*reward, "--device", "cpu", "--threads", "1", "--allow-chance"]) == 0
        trees.append({root: tree(folder / root) for root in ("sft", "rm")})
        texts = [path for root in ("sft", "rm") for path in (folder / root).rglob("*.json*")]
        assert [path for path in texts if str(tmp_path) in path.read_text()] == []
    assert trees[0] == trees[1]
