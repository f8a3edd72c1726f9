"""The command line. Heavy imports happen inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 fine, 1 failed, 2 usage, 3 a gate failed, 130 interrupted."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:  # a stream that the caller has closed is opened on nothing, so that no file takes its number
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    try:
        from raftune.cli.app import app
        from raftune.cli.errors import run_command

        return run_command(app, list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # while modules are imported, or again while the first is reported
        os.write(2, b"\nstopped at once.\n")
        return 130
