"""The list of runs shows what can be seen, whatever else lies in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raftune.results.status import DAMAGED, status_of
from raftune.runtime import run
from tests.runs import tiny


def test_a_folder_that_may_not_be_looked_into_hides_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.run(tiny.config(tmp_path / "mine", num_rounds=0), tiny.objects())
    (tmp_path / "lost+found").mkdir()
    exists = run.RunFolder.exists

    def refused(folder: run.RunFolder) -> bool:  # root, as whom tests may run, is refused nothing
        if folder.root.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder.root))
        return exists(folder)

    monkeypatch.setattr(run.RunFolder, "exists", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found")
    assert run.all_runs(tmp_path) == [tmp_path / "mine"]


def test_a_run_that_is_deleted_while_it_is_looked_at_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert status_of(tmp_path / "gone").state == DAMAGED
