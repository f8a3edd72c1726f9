"""`raftune verify`: checks the hashes of everything in a run."""

from __future__ import annotations

import contextlib
import json

from raftune.cli.flags import Json, RunDirectory
from raftune.cli.output import echo
from raftune.errors import RunDamaged
from raftune.results.samples import span
from raftune.runtime import run as runs
from raftune.sanitize import counted, megabytes
from raftune.store.commit import Manifest
from raftune.store.run import RunFolder

WEIGHTS, LATENTS = "the weights", "the latents of what was generated and not kept"
RESTORE = {
    WEIGHTS: "`raftune resume RUN --keep-models all --from ROUND/train` makes them again.",
    LATENTS: "`raftune resume RUN --keep-latents all --from ROUND/generate` generates the same again.",
}


def verify(run: RunDirectory, *, as_json: Json = False) -> int:
    """Check the hashes of everything in a run, and name what is missing, changed, or inconsistent.

    The exit code is 0 if everything is as committed, otherwise 1.
    """
    faults = runs.verify(run)
    folder = RunFolder(run)
    commits: list[Manifest] = []
    for round_, name in folder.places():
        with contextlib.suppress(RunDamaged):  # an unreadable manifest is among the faults
            if commit := folder.commit(round_, name):
                commits.append(commit)
    files = sum(len(commit.files) for commit in commits)
    size = sum(entry.bytes for commit in commits for entry in commit.files.values())
    dropped = deleted_on_purpose(folder)
    if as_json:
        facts = {"run": run, "stages": len(commits), "files": files, "bytes": size, "faults": faults}
        print(json.dumps({**facts, "dropped": dropped}))
    elif faults:
        echo(*faults)
        echo(f"{len(faults)} of {files} files or links are not as committed. Restore them, or redo with --from.")
    else:
        counts = f"{counted(len(commits), 'stage')}, {counted(files, 'file')}"
        echo(f"{run} is whole: {counts}, {megabytes(size)}, every SHA-256 as committed.")
    for kind, rounds in dropped.items():
        echo(f"  not here on purpose: {kind} of round {span(rounds)}. {RESTORE[kind]}", style="dim")
    return 1 if faults else 0


def deleted_on_purpose(folder: RunFolder) -> dict[str, list[int]]:
    """The rounds of which weights or latents were deleted by the run's own settings."""
    dropped = {}
    with contextlib.suppress(RunDamaged):  # an unreadable marker is among the faults
        if weights := [r for r in folder.rounds() if folder.is_dropped(r, "model")]:
            dropped[WEIGHTS] = weights
        stages = ("generate", "teach")
        if latents := [r for r in folder.rounds() if any(folder.dropped_columns(r, stage) for stage in stages)]:
            dropped[LATENTS] = latents
    return dropped
