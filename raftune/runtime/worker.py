"""Entry point of a worker process, which runs chunks: `python -m raftune.runtime.worker RUN IN OUT`.

Requests and replies are JSON. The process exits when its input closes, even in the middle of a chunk, so it never
outlives its run. It holds no lock.
"""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raftune.engines.pool import FINAL, versions
from raftune.engines.process import serve
from raftune.errors import EngineError, OutOfMemory
from raftune.protocols import ChunkedStage
from raftune.runtime.assembly import Runtime, open_runtime
from raftune.store.files import explaining
from raftune.store.job import StageJob, run_chunk
from raftune.store.run import RunFolder

PATIENCE = 10.0  # seconds in which a network file system shows what another machine wrote


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
            if "start" in request:
                return self.start(**request["start"])
            job = self.job(request["round"], request["stage"], request["key"])
            job.run.holder = request["holder"]
            assert isinstance(job.stage, ChunkedStage)
            with explaining(job.run.root):
                return {"entry": asdict(run_chunk(job, job.stage, request["chunk"]))}
        except Exception as error:
            traceback.print_exc()
            size = {"batch_size": error.batch_size} if isinstance(error, OutOfMemory) else {}
            return {"kind": type(error).__name__, "error": str(error), "final": isinstance(error, FINAL), **size}

    def start(self, holder: str | None, host: str, versions: dict[str, str]) -> dict[str, Any]:
        """The host and the device on which this worker runs chunks of the lock's holder on `host`.

        Raises EngineError where it does not see the run, or has other versions than that process.
        """
        check_run_is_visible(self.root, holder, host)
        check_versions(versions)
        self.runtime = open_runtime(self.root)
        return {"host": platform.node(), "device": device_name()}

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


def check_run_is_visible(root: str, holder: str | None, host: str) -> None:
    """Raises EngineError unless the folder that the holder of the run's lock wrote is visible here."""
    run, end = RunFolder(root), time.monotonic() + PATIENCE
    run.holder = holder
    while holder is not None and not run.is_held():
        if time.monotonic() > end:
            raise EngineError(
                f"output_dir must be on a disk that all machines share; {platform.node()} does not see what "
                f"{host} wrote in {run.root.resolve()}. Put the run on a shared disk, under the same path."
            )
        time.sleep(0.2)


def check_versions(expected: Mapping[str, str]) -> None:
    """Raises EngineError where this worker has other versions than the process that runs the loop."""
    own = versions()
    if different := [name for name in sorted({*own, *expected}) if own.get(name) != expected.get(name)]:
        words = ", ".join(f"{n} {own.get(n, 'none')} instead of {expected.get(n, 'none')}" for n in different)
        raise EngineError(
            f"workers must have the versions of the process that runs the loop, or their results differ; "
            f"{platform.node()} has {words}. Install the same ones there."
        )


def device_name() -> str:
    """The device of this process's models."""
    torch = sys.modules.get("torch")
    if torch is None:
        return f"CPU {platform.machine()}"
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
