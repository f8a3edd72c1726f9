"""What commands are given in the place of a run, and what they print to be typed next."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from raftune.cli import main
from raftune.errors import ConfigError
from raftune.runtime.evaluation_target import parse_target
from tests.runs.test_cli import CONFIG, REWARDS

NEEDS = {
    "export": ["--format", "sft", "--out", "out.jsonl"],
    "rescore": ["--rewards.reward_funcs", "length"],
}
READERS = ("samples", "alarms", "report", "rescore", "select", "verify", "resume", "export")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one of them stopped before its first round, and an evaluation, in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("my") / "Läufe von heute"
    folder.mkdir()
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": i % 4} for i in range(20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    files = {"data": {"prompts": str(folder / "train.jsonl")}}
    files["evaluation"] = {**CONFIG["evaluation"], "prompts": str(folder / "held_out.jsonl")}
    files["evaluation"]["reward_funcs"] = [f"{folder / 'rewards.py'}:best"]
    files["rewards"] = {"reward_funcs": [f"{folder / 'rewards.py'}:value"]}
    (folder / "tab.yaml").write_text(yaml.safe_dump({**CONFIG, **files}))
    command = ["train", str(folder / "tab.yaml"), "--output-dir"]
    assert main([*command, str(folder / "runs" / "polite run")]) == 0
    assert main([*command, str(folder / "runs" / "begun"), "--num-rounds", "1"]) == 0
    for path in (folder / "runs" / "begun").glob("round-0001"):
        path.rename(folder / "gone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["evaluate", "runs/polite run", "--output-dir", "before"]) == 0
    return folder


def output_of(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main([*command, *NEEDS.get(command[0], [])])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def commands_in(text: str) -> list[list[str]]:
    """The commands that a person would copy: after two blanks, in backquotes, or after a colon."""
    quoted = re.findall(r"`(raftune [^`]*)`", text)
    lines = re.findall(r"(?m)(?:^| {2}|: )(raftune [^`\n]*?)(?: {8}.*)?$", text)
    return [shlex.split(command) for command in [*quoted, *lines]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("train", "tab.yaml", "--output-dir", "runs/polite run"),
        ("evaluate", "runs/polite run", "--output-dir", "before"),
        ("resume", "before"),
        ("alarms", "before"),
        ("select", "before"),
        ("alarms", "runs/begun"),
        ("train", "runs/polite run"),
        ("verify", "tab.yaml"),
        ("samples", "polite run"),
    ],
    ids=" ".join,
)
def test_a_printed_command_works_in_the_working_directory(
    place: Path,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    _, text = output_of(capsys, *command)
    if command[0] == "samples":
        assert "Did you mean runs/polite run?" in text
        return
    found = [words for words in commands_in(text) if not {"NEW", "OTHER"} & set(words)]
    assert found, text
    for words in found:
        words = [str(tmp_path / "out") if word == "DIR" else word for word in words]
        assert words[1] in ("resume", "samples", "export", "alarms", "train") and len(words) > 2
        assert main(words[1:]) == 0, words


@pytest.mark.parametrize("command", READERS)
def test_a_name_in_the_folder_runs_is_suggested(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for given in ("polite run", "polite rum", "runs/polite-run"):
        code, text = output_of(capsys, command, given)
        assert code == 1 and "Did you mean runs/polite run?" in text, text


@pytest.mark.parametrize("command", READERS)
def test_what_is_no_run_is_recognised(
    place: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "reward" / "model").mkdir(parents=True)
    (tmp_path / "reward" / "model" / "raftune_reward.json").write_text("{}")
    for given, words in (
        ("tab.yaml", "it is a configuration. `raftune train tab.yaml` runs it."),
        ("runs", "holds no run itself, but the runs begun, polite run"),
        ("runs/polite run/round-0001", "it is in the run runs/polite run."),
        (str(tmp_path / "reward"), "it is what `raftune reward train` wrote."),
        ("runs/polite run@2", "Did you mean runs/polite run --round 2?"),
    ):
        code, text = output_of(capsys, command, given)
        assert code == 1 and words in text, text


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_run_in_the_place_of_a_configuration_is_resumed_by_its_own_command(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    code, text = output_of(capsys, command, "runs/polite run")
    assert code == 2 and "`raftune resume 'runs/polite run'` goes on with it" in text
    assert "YAML: IsADirectoryError" not in text


@pytest.mark.slow
def test_an_evaluation_is_not_advised_to_train(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for command in ("alarms", "select", "rescore", "export"):
        _, text = output_of(capsys, command, "before")
        assert "It is an evaluation" in text and "resume" not in text, text
    code, text = output_of(capsys, "resume", "before")
    assert code == 0 and "held-out prompts" in text and "the start itself" not in text


def test_an_evaluation_takes_the_model_of_a_folder_that_sft_wrote_and_refuses_a_reward_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.yaml", "rows.parquet", "report.json", "model/config.json"):
        (tmp_path / "taught" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "taught" / name).write_text("{}")
    assert parse_target(str(tmp_path / "taught")).policy == {"model": str(tmp_path / "taught" / "model")}
    (tmp_path / "taught" / "model" / "raftune_reward.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a reward model"):
        parse_target(str(tmp_path / "taught"))
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match="did you mean runs/polite run"):
        parse_target("polite run")
