"""What a power cut would need: content is durable before it has its name, names before the COMMIT that lists them.

A killed process keeps what the kernel was given, so that no kill can show a missing fsync: its place is checked here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from raftune.runtime.run import run
from tests.runs import tiny

pytestmark = pytest.mark.slow

Inode = int


@dataclass
class Record:
    """What was asked of the system, in order: ("fsync", inode, size) or ("rename", inode, target)."""

    events: list[tuple[str, Inode, object]] = field(default_factory=list)

    def fsync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.events.append(("fsync", found.st_ino, found.st_size))

    def named(self, path: Path) -> int:
        """Where in the record the file got its name."""
        return self.events.index(("rename", path.stat().st_ino, path))

    def last_sync(self, inode: Inode, before: int) -> int:
        """Where this was last synced before this place; -1 if never. A number may have been another file's earlier."""
        return max((i for i in range(before) if self.events[i][:2] == ("fsync", inode)), default=-1)

    def first(self, kind: str, inode: Inode, after: int = 0) -> int:
        """Where in the record this was first asked, at or after this place; the end of the record if never."""
        places = (i for i, event in enumerate(self.events) if i >= after and event[:2] == (kind, inode))
        return next(places, len(self.events))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, synced: None) -> tuple[Path, Record]:
    """A whole run, and what it asked of the system."""
    root, record, rename = tmp_path_factory.mktemp("recorded") / "run", Record(), os.replace

    def replace(source: Path, target: Path) -> None:
        record.events.append(("rename", Path(source).stat().st_ino, Path(target)))
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", record.fsync)
        patch.setattr(os, "replace", replace)
        run(tiny.config(root), tiny.objects())
    return root, record


def published(root: Path) -> list[Path]:
    """Every file of the run but the lock, the record of times and what lies under tmp/."""
    names = ("events.jsonl", "LOCK")
    return [p for p in root.rglob("*") if p.is_file() and p.name not in names and p.parent != root / "tmp"]


def test_every_file_is_synced_with_its_whole_content_then_named_then_its_folder_is_synced(
    recorded: tuple[Path, Record],
) -> None:
    root, record = recorded
    files = published(root)
    assert len(files) > 80
    for path in files:
        inode, size = path.stat().st_ino, path.stat().st_size
        renamed = record.named(path)
        synced = record.last_sync(inode, before=renamed)
        assert synced >= 0, path
        assert record.events[synced][2] == size, path
        assert record.first("fsync", path.parent.stat().st_ino, after=renamed) < len(record.events), path


def test_files_of_a_manifest_are_durable_before_the_manifest_has_its_name(
    recorded: tuple[Path, Record],
) -> None:
    root, record = recorded
    commits = list(root.rglob("_COMMIT.json"))
    assert len(commits) == 34
    for commit in commits:
        sealed = record.named(commit)
        for name in json.loads(commit.read_text())["files"]:
            path = commit.parent / name
            renamed = record.named(path)
            assert record.first("fsync", path.parent.stat().st_ino, after=renamed) < sealed, path


def test_every_new_folder_is_synced_into_the_one_above_it(recorded: tuple[Path, Record]) -> None:
    root, record = recorded
    folders = [path for path in root.rglob("*") if path.is_dir() and path.name != "tmp"]
    assert len(folders) > 30
    for folder in folders:
        assert record.first("fsync", folder.parent.stat().st_ino) < len(record.events), folder
