"""The entry of a worker process: built from a run's configuration, it runs the units that it is told.

    python -m raftune.worker RUN

Questions come as lines of JSON on stdin, answers go as lines to what was stdout; user code that prints writes to stderr.
The process exits when its stdin closes, so that it never outlives the loop that started it, and it holds no lock.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any, TextIO

from raftune.build import Assembly, open_assembly
from raftune.errors import RaftuneError
from raftune.store.job import run_unit


def main(argv: list[str] | None = None) -> int:
    """Serves until stdin closes."""
    root = (argv if argv is not None else sys.argv[1:])[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop decides; a worker ends when its stdin closes
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        assembly = open_assembly(root)
        try:
            serve(assembly, sys.stdin, answers)
        finally:
            assembly.close()
    return 0


def serve(assembly: Assembly, questions: TextIO, answers: TextIO) -> None:
    """Answers each line with one line."""
    for line in questions:
        answers.write(json.dumps(answer(assembly, json.loads(line))) + "\n")
        answers.flush()


def answer(assembly: Assembly, question: dict[str, Any]) -> dict[str, Any]:
    """The receipt of a unit, or what went wrong."""
    if question.get("rest"):
        assembly.policies.release()
        return {}
    try:
        stage = assembly.stage(question["round"], question["stage"])
        job = assembly.job(stage, question["round"])
        assert job.key == question["key"], "a worker and its loop must agree on the key of a job"
        receipt = run_unit(job, stage, question["unit"])  # type: ignore[arg-type]
        return {"seconds": receipt.seconds, "notes": receipt.notes}
    except RaftuneError as error:
        return {"kind": type(error).__name__, "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"kind": type(error).__name__, "error": str(error)}


if __name__ == "__main__":
    sys.exit(main())
