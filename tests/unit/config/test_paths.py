"""A path in a configuration file is found beside that file, from wherever the command is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from raftune.config.load import load_config

RUN = """
data: {prompts: prompts.jsonl}
policy: {family: "family.py:Mine"}
rewards:
  reward_funcs:
    - reward.py:score
    - {spec: reward.py:other, name: other}
    - {spec: aesthetic, options: {model: ./head.safetensors}}
    - length
evaluation: {prompts: elsewhere.jsonl, reward_funcs: ["judge.py:judge"]}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project" / "mine"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(RUN)
    for name in ("prompts.jsonl", "family.py", "reward.py", "head.safetensors", "length"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path / "project")
    return folder


def test_paths_are_found_beside_the_file(home: Path) -> None:
    config = load_config(["mine/run.yaml"])
    assert (config.data.prompts, config.policy.family) == ("mine/prompts.jsonl", "mine/family.py:Mine")
    first, other, head, _ = config.rewards.reward_funcs
    assert (first.spec, other.spec) == ("mine/reward.py:score", "mine/reward.py:other")
    assert head.options == {"model": "mine/head.safetensors"}


def test_other_paths_are_relative_to_the_working_directory(home: Path) -> None:
    config = load_config(["mine/run.yaml"])
    assert config.evaluation.prompts == "elsewhere.jsonl"
    assert config.evaluation.reward_funcs[0].spec == "judge.py:judge"


def test_a_plain_word_is_a_name_and_not_a_path(home: Path) -> None:
    assert load_config(["mine/run.yaml"]).rewards.reward_funcs[-1].spec == "length"


def test_a_path_beside_the_file_precedes_the_working_directory(home: Path) -> None:
    Path("prompts.jsonl").touch()
    assert load_config(["mine/run.yaml"]).data.prompts == "mine/prompts.jsonl"


def test_a_flag_is_relative_to_the_working_directory(home: Path) -> None:
    assert load_config(["mine/run.yaml"], {"data.prompts": "prompts.jsonl"}).data.prompts == "prompts.jsonl"


def test_a_file_that_is_used_in_place_is_read_unchanged(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert load_config(["run.yaml"]).rewards.reward_funcs[2].options == {"model": "./head.safetensors"}


def test_from_outside_paths_lead_back(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far").mkdir()
    monkeypatch.chdir(tmp_path / "far")
    assert load_config(["../project/mine/run.yaml"]).policy.family == "../project/mine/family.py:Mine"


def test_a_backend_and_an_engine_are_found_beside_the_file_in_either_form(home: Path) -> None:
    (home / "long.yaml").write_text('sampling: {backend: {kind: "reward.py:B"}}\nengine: {kind: "reward.py:E"}\n')
    (home / "short.yaml").write_text('sampling: {backend: "reward.py:B"}\nengine: "reward.py:E"\n')
    for file in ("mine/long.yaml", "mine/short.yaml"):
        config = load_config(["mine/run.yaml", file])
        assert (config.sampling.backend, config.engine.kind) == ("mine/reward.py:B", "mine/reward.py:E")
