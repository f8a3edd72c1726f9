"""Entry point of a worker process, which runs chunks: `python -m raftune.runtime.worker RUN IN OUT`.

Requests and replies are JSON. The process exits when its input closes, even in the middle of a chunk, so it never
outlives its run. It holds no lock.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any

from raftune.engines.local import FINAL
from raftune.engines.process import serve
from raftune.errors import OutOfMemory
from raftune.protocols import ChunkedStage
from raftune.runtime.assembly import Runtime, open_runtime
from raftune.store.files import explaining
from raftune.store.job import StageJob, run_chunk


def main() -> None:
    """Serves until its input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop decides
    server = WorkerServer(sys.argv[1])
    for request, reply in serve(server.close):
        reply(json.dumps(server.answer(json.loads(request))).encode())


class WorkerServer:
    """Runs chunks of one run on request; builds its runtime on the first one."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.runtime: Runtime | None = None
        self._job: StageJob | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The journal entry of a chunk, or the error, and whether it would be raised again."""
        try:
            if request.get("rest"):
                if self.runtime is not None:
                    self.runtime.policies.release()
                return {}
            job = self.job(request["round"], request["stage"], request["key"])
            assert isinstance(job.stage, ChunkedStage)
            with explaining(job.run.root):
                return {"entry": asdict(run_chunk(job, job.stage, request["chunk"]))}
        except Exception as error:
            traceback.print_exc()
            size = {"batch_size": error.batch_size} if isinstance(error, OutOfMemory) else {}
            return {"kind": type(error).__name__, "error": str(error), "final": isinstance(error, FINAL), **size}

    def job(self, round_: int, name: str, key: str) -> StageJob:
        """The job with this key; the last one is kept, since a stage has many chunks."""
        if self._job is None or self._job.key != key:
            if self.runtime is None:
                self.runtime = open_runtime(self.root)
            self._job = self.runtime.job(self.runtime.stage(round_, name), round_)
            assert self._job.key == key, "a worker and its loop must agree on the key of a job"
        return self._job

    def close(self) -> None:
        if self.runtime is not None:
            self.runtime.close()
        sys.stdout.flush()


if __name__ == "__main__":
    main()
