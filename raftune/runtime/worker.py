"""Entry point of a worker process, which runs chunks.

    python -m raftune.runtime.worker RUN

Requests are lines of JSON on stdin, replies are lines on the original stdout; output of user code goes to stderr. The
process exits when its stdin closes, even in the middle of a chunk, so it never outlives its run. It holds no lock.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any, TextIO

from raftune.engines.local import FINAL
from raftune.errors import OutOfMemory
from raftune.protocols import ChunkedStage
from raftune.runtime.assembly import Runtime, open_runtime
from raftune.store.files import explaining
from raftune.store.job import StageJob, run_chunk


def main(argv: list[str] | None = None) -> int:
    """Serves until stdin closes."""
    root = (argv if argv is not None else sys.argv[1:])[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop decides; a worker ends when its stdin closes
    with os.fdopen(os.dup(0)) as questions, os.fdopen(os.dup(1), "w") as answers:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        desk = WorkerServer(root)
        try:
            desk.serve(told(questions), answers)
        finally:
            desk.close()
    return 0


def told(questions: TextIO) -> Iterator[dict[str, Any]]:
    """The questions one by one; the process ends at once if they end while one is being answered."""
    lines: SimpleQueue[str | None] = SimpleQueue()
    busy = threading.Event()

    def read() -> None:
        for line in questions:
            busy.set()
            lines.put(line)
        if busy.is_set():
            os._exit(1)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield json.loads(line)
        busy.clear()


class WorkerServer:
    """Runs chunks of one run on request; builds its runtime on the first one."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.assembly: Runtime | None = None
        self._job: StageJob | None = None

    def serve(self, questions: Iterable[dict[str, Any]], answers: TextIO) -> None:
        """Answers each with one line."""
        for question in questions:
            answers.write(json.dumps(self.answer(question)) + "\n")
            answers.flush()

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The journal entry of a chunk, or what went wrong, and whether it would go wrong again."""
        try:
            if question.get("rest"):
                if self.assembly is not None:
                    self.assembly.policies.release()
                return {}
            job = self.job(question["round"], question["stage"], question["key"])
            assert isinstance(job.stage, ChunkedStage)
            with explaining(job.run.root):
                return {"entry": asdict(run_chunk(job, job.stage, question["chunk"]))}
        except Exception as error:
            traceback.print_exc()
            size = {"batch_size": error.batch_size} if isinstance(error, OutOfMemory) else {}
            return {"kind": type(error).__name__, "error": str(error), "final": isinstance(error, FINAL), **size}

    def job(self, round_: int, name: str, key: str) -> StageJob:
        """The job that the loop speaks of; the last one is kept, for a stage has many units."""
        if self._job is None or self._job.key != key:
            if self.assembly is None:
                self.assembly = open_runtime(self.root)
            self._job = self.assembly.job(self.assembly.stage(round_, name), round_)
            assert self._job.key == key, "a worker and its loop must agree on the key of a job"
        return self._job

    def close(self) -> None:
        if self.assembly is not None:
            self.assembly.close()


if __name__ == "__main__":
    sys.exit(main())
