"""The list of runs shows what can be seen, whatever else lies in the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raftune import runs
from raftune.status import DAMAGED, status_of
from tests.runs import tiny


def test_a_folder_that_may_not_be_looked_into_hides_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.run(tiny.config(tmp_path / "mine", num_rounds=0), tiny.objects())
    (tmp_path / "lost+found").mkdir()
    exists = runs.RunFolder.exists

    def refused(folder: runs.RunFolder) -> bool:  # root, as whom tests may run, is refused nothing
        if folder.root.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder.root))
        return exists(folder)

    monkeypatch.setattr(runs.RunFolder, "exists", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "lost+found")
    assert runs.all_runs(tmp_path) == [tmp_path / "mine"]


def test_a_run_that_is_deleted_while_it_is_looked_at_is_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert status_of(tmp_path / "gone").state == DAMAGED
