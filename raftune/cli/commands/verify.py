"""`raftune verify`: checks the hashes of everything in a run."""

from __future__ import annotations

import contextlib
import json as js
from collections.abc import Iterator
from typing import Annotated

from cyclopts import Parameter

from raftune.cli.output import echo
from raftune.errors import RunDamaged
from raftune.results.samples import span
from raftune.runtime import run as runs
from raftune.sanitize import counted, megabytes
from raftune.store.commit import Manifest
from raftune.store.run import RunFolder

WEIGHTS, LATENTS = "the weights", "the latents of what was generated and not kept"
AGAIN = {
    WEIGHTS: "`raftune resume RUN --keep-models all --from ROUND/train` makes them again.",
    LATENTS: "`raftune resume RUN --keep-latents all --from ROUND/generate` generates the same again.",
}


def verify(
    run: Annotated[str, Parameter(help="The run's directory.")],
    *,
    json: Annotated[bool, Parameter(negative="", show_default=False, help="Print the findings as JSON.")] = False,
) -> int:
    """Check the hashes of everything in a run, and name what is missing, changed, or inconsistent.

    The exit code is 0 if everything is as committed, otherwise 1.
    """
    faults = runs.verify(run)
    commits = list(readable(RunFolder(run)))
    files = sum(len(commit.files) for commit in commits)
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    dropped = dict(let_go(RunFolder(run)))
    if json:
        facts = {"run": run, "stages": len(commits), "files": files, "bytes": size, "faults": faults}
        print(js.dumps({**facts, "dropped": dropped}))
    elif faults:
        for fault in faults:
            echo(fault)
        echo(f"{len(faults)} of {files} files or links are not as committed. Restore them, or redo with --from.")
    else:
        whole = f"{counted(len(commits), 'stage')}, {counted(files, 'file')}"
        echo(f"{run} is whole: {whole}, {megabytes(size)}, every SHA-256 as committed.")
    for what, rounds in dropped.items():
        echo(f"  not here on purpose: {what} of round {span(rounds)}. {AGAIN[what]}", style="dim")
    return 1 if faults else 0


def let_go(folder: RunFolder) -> Iterator[tuple[str, list[int]]]:
    """What was deleted on purpose, with the rounds of which it was."""
    rounds = folder.rounds()
    with contextlib.suppress(RunDamaged):  # a marker that cannot be read is among the faults
        if weights := [round_ for round_ in rounds if folder.is_dropped(round_, "model")]:
            yield WEIGHTS, weights
        drawn = [r for r in rounds if folder.dropped_columns(r, "generate") or folder.dropped_columns(r, "teach")]
        if drawn:
            yield LATENTS, drawn


def readable(folder: RunFolder) -> Iterator[Manifest]:
    """Every manifest that can be read; one that cannot is among the faults."""
    for round_, name in folder.places():
        with contextlib.suppress(RunDamaged):
            if commit := folder.commit(round_, name):
                yield commit
