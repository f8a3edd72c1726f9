"""What of a committed stage is let go on purpose: a marker beside its COMMIT says what, and what its files are since.

The COMMIT stays as it is, and with it every key that was made from it. Where whole files are gone the marker says so;
where columns are, it has the sizes and hashes of the files without them, so that damage is seen as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.errors import RunDamaged
from raftune.store.commit import Commit, FileEntry
from raftune.store.files import stage_file, write_json
from raftune.store.parquet import column_names, read_metadata, read_table, write_table

MARKER = "DROPPED.json"


@dataclass(frozen=True)
class Dropped:
    """`columns` are gone from the files, which are `files` since; none says that whole files are gone."""

    why: str
    columns: tuple[str, ...] = ()
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Dropped | None:
        """What the folder's marker says, None without one. Raises RunDamaged."""
        path = folder / MARKER
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
            files = {name: FileEntry(**entry) for name, entry in found.get("files", {}).items()}
            return cls(str(found.get("why", "")), tuple(found.get("columns", ())), files)
        except (ValueError, TypeError, AttributeError) as error:
            raise RunDamaged(f"{path} does not say what was dropped. Restore it, or redo its stage.") from error

    def save(self, folder: Path, tmp: Path) -> None:
        content: dict[str, Any] = {"why": self.why}
        if self.columns:
            files = {name: asdict(entry) for name, entry in self.files.items()}
            content |= {"columns": list(self.columns), "files": files}
        write_json(tmp, folder / MARKER, content)


def drop_columns(folder: Path, tmp: Path, columns: Sequence[str], why: str) -> None:
    """Empties these columns of the committed tables in the folder; files without any of them stay as they are.

    File by file: first the marker says what the file will be, then it is replaced. A kill between the two leaves the
    file as it was committed, and the next call goes on from there.
    """
    commit, known = Commit.load(folder), Dropped.load(folder)
    assert commit is not None, "only what is committed is let go"
    files = dict(known.files) if known is not None else {}
    for name in sorted(name for name in commit.files if name.endswith(".parquet")):
        path = folder / name
        if name in files and files[name].bytes == path.stat().st_size:
            continue
        present = [column for column in columns if column in column_names(path)]
        if not present:
            continue
        with stage_file(tmp, path) as staged:
            write_without(path, staged, present)
            files[name] = FileEntry(**asdict(FileEntry.of(staged)) | {"rows": commit.files[name].rows})
            Dropped(why, tuple(columns), dict(sorted(files.items()))).save(folder, tmp)


def write_without(path: Path, out: Path, columns: Sequence[str]) -> None:
    """The table with nothing in these columns, every other value and the metadata as they were."""
    table, (_, metadata) = read_table(path), read_metadata(path)
    for name in columns:
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.nulls(table.num_rows, table.schema.types[place]))
    write_table(table, out, metadata)
