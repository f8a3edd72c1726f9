"""Somebody else's run is read without running its code or sending files along; and what a shell may do to a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raftune.cli.errors import unforeseen
from raftune.errors import ConfigError, RunDamaged, StoreError
from raftune.policies.registry import load_policy
from raftune.results.export import export
from raftune.results.model_card import publish_model
from raftune.results.status import status_of
from raftune.runtime.assembly import Runtime
from raftune.runtime.run import run
from raftune.store.committed import check_folder
from raftune.store.files import set_usual_mode
from raftune.store.run import RunFolder
from tests.runs import tiny

FAMILY = """
from pathlib import Path
Path({marker!r}).touch()
from raftune.policies.tabular.policy import Tabular as Family
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(root), tiny.objects())
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_tokens_of_a_run_with_a_family_of_its_own_are_not_exported_without_consent(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "family.py").write_text(FAMILY.format(marker=str(marker)))
    folder = RunFolder(copy)
    policy = {"family": f"{tmp_path / 'family.py'}:Family", "options": {}}
    folder.write_config(folder.read_config() | {"policy": policy})
    with pytest.raises(ConfigError, match=r"would import code that the run's configuration names .*--allow-code"):
        export(copy, "sft-tokens", tmp_path / "out.jsonl")
    assert export(copy, "sft", tmp_path / "rows.jsonl") > 0
    assert not marker.exists()
    with pytest.raises(ConfigError, match="needs a family with tokens"):
        export(copy, "sft-tokens", tmp_path / "out.jsonl", allow_code=True)
    assert marker.exists()


def test_no_link_out_of_a_model_folder_is_exported(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    folder = copy / "round-0001/model"
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(RunDamaged, match=r"notes\.txt was not committed"):
        publish_model(copy, tmp_path / "out", 1)
    (folder / "notes.txt").unlink()
    content = (folder / "policy.json").read_bytes()
    (tmp_path / "policy.json").write_bytes(content)
    (folder / "policy.json").unlink()
    (folder / "policy.json").symlink_to(tmp_path / "policy.json")
    with pytest.raises(StoreError, match=r"policy\.json is a link out of the model's folder"):
        publish_model(copy, tmp_path / "out", 1)


def test_a_damaged_model_is_neither_exported_nor_loaded_and_the_export_is_checked_in_turn(
    copy: Path, tmp_path: Path
) -> None:
    out = publish_model(copy, tmp_path / "out", 1)
    assert check_folder(out) == out
    (out / "policy.json").write_bytes((out / "policy.json").read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(RunDamaged, match=r"policy\.json has changed .*delete .*raftune_files\.json"):
        check_folder(out)
    path = copy / "round-0001/model/policy.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(RunDamaged, match=r"policy\.json has changed since it was committed.*--from 1/train"):
        publish_model(copy, tmp_path / "again", 1)
    assembly = Runtime(RunFolder(copy), tiny.config(copy), tiny.objects())
    try:
        with pytest.raises(RunDamaged, match=r"round-0001/model/policy\.json"):
            load_policy(assembly.family, assembly.config, copy / "round-0001/model", copy / "round-0000/model")
    finally:
        assembly.close()


@pytest.mark.skipif(os.name == "nt", reason="modes of files are those of POSIX")
def test_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    (tmp_path / "private").touch(mode=0o600)
    set_usual_mode(tmp_path)
    assert (tmp_path / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_empty_run_is_not_reported_as_resumable(copy: Path) -> None:
    for folder in copy.glob("round-*"):
        shutil.rmtree(folder)
    for name in ("events.jsonl", "best.json"):
        (copy / name).unlink()
    assert status_of(copy).state == "not started"


def raftune(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = f"{sys.executable} -m raftune {command}"
    return subprocess.run(["sh", "-c", line], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_closed_stdout_is_no_failure(finished: Path) -> None:
    ended = raftune(f"verify {finished} >&-", finished.parent)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_folder_that_was_deleted_is_named(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    line = f"rmdir {tmp_path / 'gone'}; {sys.executable} -m raftune verify {finished}"
    ended = subprocess.run(["sh", "-c", line], cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "has been deleted" in ended.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't start new thread")]
)
def test_scarce_memory_is_no_bug(error: Exception) -> None:
    assert unforeseen(error).startswith("memory ran out") and "bug" not in unforeseen(error)
