"""A directory is one process's and one configuration's: everything else is refused in words, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftune.errors import ConfigError, RewardError, RunInUse, StoreError
from raftune.runtime.run import resume, run, verify
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, harness, tree

REPOSITORY = Path(__file__).parents[2]
HOLDER = """
    import sys, time
    from raftune.store.run import RunFolder
    with RunFolder(sys.argv[1]).lock():
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("whole") / "run"
    run(tiny.config(root), tiny.objects())
    return tree(root)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path/run."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_directory_that_another_process_holds_is_refused_and_left_alone(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    scrap = tmp_path / "run/tmp/half-written"
    scrap.write_text("by the other process")
    with pytest.raises(RunInUse, match=r"run is in use by another process\. Wait for it to end"):
        run(tiny.config(tmp_path / "run"), tiny.objects())
    assert scrap.exists()


def test_the_directory_of_a_process_that_was_killed_is_free(
    tmp_path: Path, holder: subprocess.Popen[str], whole: dict[str, str]
) -> None:
    (tmp_path / "run/tmp/half-written").write_text("by the other process")
    holder.kill()
    holder.wait()
    run(tiny.config(tmp_path / "run"), tiny.objects())
    assert difference(whole, tree(tmp_path / "run")) == ""
    assert list((tmp_path / "run/tmp").iterdir()) == []


def test_the_same_process_cannot_hold_a_directory_twice(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").lock(), pytest.raises(RunInUse), RunFolder(tmp_path / "run").lock():
        pass


def test_reading_and_verifying_need_no_lock(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    with RunFolder(tmp_path / "run").lock():
        assert verify(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["thesis.tex", ".git", "runs"])
def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(StoreError, match=rf"must be empty or hold a run; .* holds {name}\. Choose another output_dir"):
        run(tiny.config(tmp_path), tiny.objects())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_the_directory_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match=r"output_dir must be a directory; .* is a file"):
        run(tiny.config(tmp_path / "run"), tiny.objects())


# -- a disk that is full, or cannot be written -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("code", ["ENOSPC", "EROFS"])
def test_a_disk_that_cannot_be_written_from_any_event_on_is_named_and_what_is_committed_stays(code: str) -> None:
    report = harness(f"plain --every 13 --failing {code}")
    assert report["faults"] == []
    assert report["trials"] > 12


def test_a_small_disk_that_fills_up_is_survived(tmp_path: Path, whole: dict[str, str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or mount(disk, "200k") != 0:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(StoreError, match=r"the disk is full\. Free some space"):
            run(tiny.config(disk / "run"), tiny.objects())
        assert verify(disk / "run") == []
        assert mount(disk, "16m", "remount,") == 0
        resume(disk / "run", tiny.objects())
        assert difference(whole, tree(disk / "run")) == ""
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mount(folder: Path, size: str, options: str = "") -> int:
    command = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode


# -- an end in the middle ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage", ["data", "plan", "generate", "score", "select", "gather", "train", "evaluation generate"]
)
def test_an_exception_in_the_middle_leaves_a_run_that_can_be_resumed(
    tmp_path: Path, whole: dict[str, str], stage: str
) -> None:
    root = tmp_path / "run"

    def fail(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin" and facts["stage"] == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(root), tiny.objects(), observe=fail)
    resume(root, tiny.objects())
    assert difference(whole, tree(root)) == ""


def test_a_reward_that_fails_too_often_stops_the_run_and_fixed_it_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "run"

    def broken(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
        raise RuntimeError("no such file")

    with pytest.raises(RewardError, match=r"32 of 32 samples could not be scored.* no such file"):
        run(tiny.config(root, evaluation={"num_prompts": 0}, num_rounds=1), tiny.objects(broken))
    resume(root, tiny.objects(), redo="1/score")
    assert verify(root) == []


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    """pyarrow opens no such path: the first round ended in an error of its own."""
    root = tmp_path / os.fsdecode(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"output_dir .*UTF-8"):
        run(tiny.config(root), tiny.objects())
    assert not root.exists()
