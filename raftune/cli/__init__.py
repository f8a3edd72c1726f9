"""The command line: thin commands over the same functions that Python calls. Nothing heavy is imported early."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 fine, 1 failed, 2 usage, 3 a gate failed, 130 interrupted."""
    from raftune.cli.app import app
    from raftune.cli.ending import run_command

    return run_command(app, list(sys.argv[1:] if argv is None else argv))
