"""Names of raftune 0.1, and runs that it wrote: refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from raftune.cli import main
from raftune.config.load import validate
from raftune.errors import ConfigError, RunTooOld
from raftune.runtime.run import resume, run, verify
from tests.runs import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    run(tiny.config(root, num_rounds=1), tiny.objects())
    return root


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"tuning": {"learning_rate": 1e-3}}, "tuning is called training"),
        ({"sampling": {"unit_size": 4}}, "sampling.unit_size is called sampling.chunk_size"),
        ({"engine": {"on_unit_failure": "skip"}}, "engine.on_unit_failure is called engine.on_chunk_failure"),
        ({"engine": {"unit_timeout": 3}}, "engine.unit_timeout is called engine.chunk_timeout"),
    ],
)
def test_an_old_name_in_a_configuration_gets_one_line_with_the_new_one(old: dict[str, object], new: str) -> None:
    with pytest.raises(ConfigError, match=new) as caught:
        validate({"name": "x", "data": {"prompts": "p.jsonl"}, "rewards": {"reward_funcs": ["length"]}, **old})
    assert len([line for line in str(caught.value).splitlines() if "called" in line]) == 1


@pytest.mark.parametrize("flag", ["--tuning.learning_rate", "--sampling.unit_size"])
def test_an_old_flag_gets_one_line_with_the_new_one(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("name: x\n")
    assert main(["train", str(tmp_path / "run.yaml"), flag, "1"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert flag in line and ("--training.learning_rate" in line or "--sampling.chunk_size" in line)


@pytest.mark.parametrize(("old", "new"), [("1/tune", "1/train"), ("draw", "generate"), ("tune", "train")])
def test_an_old_stage_gets_one_line_with_the_new_one(finished: Path, old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"--from {new}"):
        resume(finished, tiny.objects(), redo=old)


def test_a_run_of_an_earlier_version_is_refused_and_its_version_named(finished: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.resolved.json").write_text(json.dumps({"name": "old", "tuning": {"learning_rate": 1.0}}))
    for read in (verify, lambda root: resume(root, tiny.objects())):
        with pytest.raises(RunTooOld, match=r"written by raftune 0\.1"):
            read(old)


@pytest.mark.parametrize("command", ["resume", "verify", "report", "samples", "alarms", "export"])
def test_every_command_refuses_a_run_of_an_earlier_version(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    (old / "round-0000" / "model").mkdir(parents=True)
    (old / "config.resolved.json").write_text(json.dumps({"name": "old", "tuning": {"learning_rate": 1.0}}))
    flags = ["--format", "model", "--out", str(tmp_path / "out")] if command == "export" else []
    assert main([command, str(old), *flags]) == 1
    assert "raftune 0.1" in capsys.readouterr().err


def test_a_stage_of_an_earlier_layout_is_refused(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path = copy / "round-0001" / "select" / "_COMMIT.json"
    path.write_text(path.read_text().replace('"layout": 3', '"layout": 1'))
    with pytest.raises(RunTooOld):
        resume(copy, tiny.objects())


def test_a_run_of_a_development_version_is_named_as_such(finished: Path, tmp_path: Path) -> None:
    old = shutil.copytree(finished, tmp_path / "old")
    for path in old.rglob("_COMMIT.json"):
        path.write_text(path.read_text().replace('"layout": 3', '"layout": 2'))
    with pytest.raises(RunTooOld, match=r"written by a development version of raftune 0\.2"):
        resume(old, tiny.objects())
