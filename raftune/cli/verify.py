"""`raftune verify`: hashes everything in a run again."""

from __future__ import annotations

import contextlib
import json as js
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter

from raftune import runs
from raftune.cli.show import say
from raftune.errors import RunDamaged
from raftune.store.commit import Commit
from raftune.store.run import RunFolder


def verify(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the findings as JSON.")] = False,
) -> int:
    """Hash everything in a run again, and name what is missing, changed, or made from something else.

    Exit code 0 where all is as it was committed, 1 where anything is not.
    """
    faults = runs.verify(run)
    commits = list(readable(RunFolder(run)))
    files = sum(len(commit.files) for commit in commits)
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    if json:
        print(js.dumps({"run": run, "stages": len(commits), "files": files, "bytes": size, "faults": faults}))
    elif faults:
        for fault in faults:
            say(fault)
        say(f"{len(faults)} of {files} files or links are not as committed. Restore them, or redo with --from.")
    else:
        say(f"{run} is whole: {len(commits)} stages, {files} files, {megabytes(size)}, every SHA-256 as committed.")
    return 1 if faults else 0


def readable(folder: RunFolder) -> Iterator[Commit]:
    """Every COMMIT that can be read; one that cannot is among the faults."""
    for round_, name in folder.places():
        with contextlib.suppress(RunDamaged):
            if commit := folder.commit(round_, name):
                yield commit


def megabytes(size: float) -> str:
    """A number of bytes in the unit that a person would use."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
