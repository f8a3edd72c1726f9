"""Workers started through `engine.launch`, one GPU for each slot, and workers whose run another process has taken."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from raftune.config import EngineConfig, validate
from raftune.engines.local import LocalProcesses, WorkerProcess, visible_gpus
from raftune.engines.pool import WorkerPool, versions
from raftune.errors import ConfigError, EngineError
from raftune.runtime.run import resume, run
from raftune.runtime.worker import WorkerServer
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree
from tests.runs.test_workers import (
    REPOSITORY,
    Orders,
    alone,  # noqa: F401, a fixture
    orders,  # noqa: F401, a fixture
    settings,
    starts_of_chunks,
    wait_until,
    without_workers,
)


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """A launcher that prints a banner and leaves the worker a child of its own, as ssh and srun do."""
    path = tmp_path / "launch.sh"
    path.write_text(
        '#!/bin/bash\nprintf "Welcome to raft, slot $1.\\nraftune:no"\nshift\n'
        'exec 3<&0\n"$@" <&3 &\nexec 3<&-\nwait $!\n'
    )
    path.chmod(0o755)
    return path


def launched(root: Path, wrapper: Path, workers: int = 1, **engine: Any) -> Any:
    return tiny.config(root, **settings(workers, engine={"launch": [str(wrapper), "{slot}"], **engine}))


def processes_of(root: Path) -> dict[int, list[str]]:
    """The command line of each process that names this run, by id: launchers and their workers."""
    return {
        process.pid: process.info["cmdline"]
        for process in psutil.process_iter(["cmdline", "status"])
        if str(root) in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE
    }


def is_worker(words: list[str]) -> bool:
    return words[1:3] == ["-m", "raftune.runtime.worker"]


@pytest.mark.slow
def test_launched_workers_write_the_same_bytes_even_when_a_launcher_is_killed(
    tmp_path: Path,
    wrapper: Path,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root, gate = tmp_path / "run", tmp_path / "gate"
    orders(gate=str(gate))
    thread = threading.Thread(target=lambda: run(launched(root, wrapper, 2), tiny.objects()))
    thread.start()
    wait_until(lambda: len(starts_of_chunks(tmp_path)) == 2)
    launchers = [pid for pid, words in processes_of(root).items() if not is_worker(words)]
    assert len(launchers) == 2
    os.kill(launchers[0], signal.SIGKILL)
    gate.touch()
    thread.join(60)
    assert sum(starts_of_chunks(tmp_path).values()) == 5
    assert difference(alone, without_workers(tree(root))) == ""
    wait_until(lambda: processes_of(root) == {})
    log = "".join((root / "tmp" / f"worker-{slot}.log").read_text() for slot in (0, 1))
    assert "Welcome to raft, slot 0." in log and "Welcome to raft, slot 1." in log


@pytest.mark.slow
def test_launched_workers_end_when_the_loop_is_killed(tmp_path: Path, wrapper: Path, orders: Orders) -> None:  # noqa: F811
    root = tmp_path / "run"
    orders(hang_always=[0, 1])
    script = f"""
        from raftune.config import RunConfig
        from raftune.runtime.run import run
        from tests.runs import tiny
        run(RunConfig.model_validate_json({launched(root, wrapper, 2).model_dump_json()!r}), tiny.objects())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY)
    wait_until(lambda: len(starts_of_chunks(tmp_path)) == 2)
    assert sum(map(is_worker, processes_of(root).values())) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: processes_of(root) == {})


def test_a_launcher_that_does_not_exist_or_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.launch must begin with a command .* got '/no/such/srun'"):
        run(launched(tmp_path / "run", Path("/no/such/srun")), tiny.objects())
    broken = tmp_path / "broken.sh"
    broken.write_text("#!/bin/sh\necho 'srun: error: no such partition' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(
        EngineError, match=r"exited with code 1 before it answered; .*worker-0.log ends: srun: error: no such partition"
    ):
        run(launched(tmp_path / "run", broken, max_retries=0), tiny.objects())

    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(EngineError, match=r"no worker was ready within engine.start_timeout = 0.5 s: .*queue"):
        run(launched(tmp_path / "run", broken, start_timeout=0.5), tiny.objects())
    assert processes_of(tmp_path / "run") == {}


@pytest.mark.slow
def test_a_worker_publishes_nothing_once_another_process_has_taken_its_run(
    tmp_path: Path,
    alone: dict[str, str],  # noqa: F811
    orders: Orders,  # noqa: F811
) -> None:
    root, gate = tmp_path / "run", tmp_path / "gate"
    run(tiny.config(root, **settings(1)), tiny.objects())
    folder = RunFolder(root)
    key = json.loads((root / "round-0001/generate/_COMMIT.json").read_text())["key"]
    for name in ("guard", "model", "rows", "select", "score", "generate"):
        folder.supersede(1, name)
    orders(gate=str(gate))
    script = (
        "import sys, time; from raftune.store.run import RunFolder; folder = RunFolder(sys.argv[1])\n"
        "with folder.lock(): print(folder.holder, flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    holder = driver.stdout.readline().strip()
    worker = WorkerProcess(root, 0, tiny.config(root, **settings(2)).engine)  # ours: it outlives its driver
    replies: list[dict[str, Any]] = []
    request = {"round": 1, "stage": "generate", "chunk": 0, "key": key, "holder": holder}
    thread = threading.Thread(target=lambda: replies.append(worker.request(request)))
    thread.start()
    wait_until(lambda: starts_of_chunks(tmp_path) == {0: 1})
    driver.kill()
    driver.wait()
    driver.stdout.close()
    with RunFolder(root).lock():
        gate.touch()
        thread.join(30)
        again = worker.request({**request, "chunk": 1})  # one that it begins only now
        for reply in (*replies, again):
            assert (reply["kind"], reply["final"]) == ("RunInUse", True), reply
        assert not (root / "round-0001" / "generate").exists()
    worker.end()
    resume(root, tiny.objects())
    assert difference(alone, without_workers(tree(root))) == ""


def test_each_worker_slot_gets_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5e, GPU-a1")
    config = tiny.config(tmp_path, **settings(3)).engine
    launcher = LocalProcesses(config, tmp_path)
    (tmp_path / "tmp").mkdir()
    assert launcher.open() == (
        "engine.workers is 3 and there are 2 GPUs: workers share a GPU, and each holds its own copy of the model",
    )
    for slot, gpu in enumerate(["GPU-5e", "GPU-a1", "GPU-5e"]):
        worker = launcher.start(slot)
        assert psutil.Process(worker.process.pid).environ()["CUDA_VISIBLE_DEVICES"] == gpu
        worker.end()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_gpus() == []


def test_fields_of_one_kind_of_engine_are_refused_with_another() -> None:
    for section, message in (
        ({"kind": "ray", "launch": ["srun"]}, r"engine\.launch is for engine\.kind: local; .* 'ray'"),
        ({"resources": {"GPU": 1}}, r"engine\.resources is for engine\.kind: ray; .* 'local'"),
        ({"address": "auto"}, r"engine\.address is for engine\.kind: ray; .* 'local'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate({"policy": {"family": "tabular"}, "data": {"prompts": "x"}, "engine": section})


class Devices(WorkerPool):
    """Workers in threads of this process that claim to be on hosts a and b, with the devices of `engine.options`."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        both = threading.Barrier(2)

        class Thread:
            seconds = 0.0

            def __init__(self, slot: int) -> None:
                self.slot, self.server = slot, WorkerServer(str(root))

            def request(self, request: dict[str, Any]) -> dict[str, Any]:
                reply = self.server.answer(request)
                if "start" not in request:
                    return reply
                both.wait(20)
                return {"host": "ab"[self.slot], "device": config.options["devices"][self.slot]}

            def end(self, reason: str = "") -> None: ...
            def close(self, patience: float) -> None: ...

        class Threads(LocalProcesses):
            def start(self, slot: int) -> Any:
                return Thread(slot)

        super().__init__(config, root, Threads(config, root))


def test_workers_on_different_devices_are_noted_and_those_without_a_gpu_among_others_refused(tmp_path: Path) -> None:
    def on(name: str, *devices: str) -> list[str]:
        notes: list[str] = []
        kind = "tests.runs.test_launched_workers:Devices"
        config = tiny.config(tmp_path / name, **settings(2, engine={"kind": kind, "options": {"devices": devices}}))
        run(config, tiny.objects(), observe=lambda event, facts: notes.extend(facts.get("notes", ())))
        return notes

    assert on("same", "H100", "H100") == []
    (note,) = on("mixed", "H100", "A100")
    assert re.fullmatch(r"workers run on different devices \((a: H100, b: A100|b: A100, a: H100)\): a chunk .*", note)
    with pytest.raises(EngineError, match=r"workers must all have a GPU or none; .* CPU x86_64.* {GPU: 1}"):
        on("refused", "H100", "CPU x86_64")


def test_a_worker_with_other_versions_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.config(root, **settings(1)), tiny.objects())
    start = {"holder": None, "host": "driver", "versions": {**versions(), "torch": "1.0", "numpy": "1"}}
    reply = WorkerServer(str(root)).answer({"start": start})
    assert (reply["kind"], reply["final"]) == ("EngineError", True)
    assert f"torch {versions()['torch']} instead of 1.0" in reply["error"]


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0, reason="no unshare")
def test_a_worker_that_does_not_see_the_run_is_refused(tmp_path: Path) -> None:
    root, script = tmp_path / "run", tmp_path / "elsewhere.sh"
    script.write_text(f'#!/bin/sh\nshift\nexec unshare -m sh -c \'mount -t tmpfs none {root}; exec "$@"\' - "$@"\n')
    script.chmod(0o755)
    with pytest.raises(EngineError, match=rf"output_dir must be on a disk that all machines share; .* wrote in {root}"):
        run(launched(root, script), tiny.objects())
