"""Runs chunks on the nodes of a Ray cluster: actors around the worker, one for each of `engine.workers`.

Ray starts the actors, gives each its resources, and says when one has died. Requests and replies are JSON; all files
go through the run directory, which every node must see under the same path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raftune.config.run import EngineConfig
from raftune.config.secrets import is_secret
from raftune.engines.pool import Reply, WorkerPool
from raftune.engines.process import MARK, ProcessDied
from raftune.errors import ConfigError, EngineError
from raftune.sanitize import first_line
from raftune.store.job import Engine

PASSED = re.compile(r"PYTHONPATH$|(HF|TRANSFORMERS|RAFTUNE)_")  # names of the environment variables that actors get
OBJECT_STORE = 80 * 2**20  # bytes, Ray's least: nothing is put there


class RayWorker:
    """An actor as a worker of the pool."""

    def __init__(self, actor: Any, reason: str = "") -> None:
        self.actor = actor
        self._reason = reason
        self._busy_since: float | None = None

    @property
    def seconds(self) -> float:
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def request(self, request: dict[str, Any]) -> Reply:
        """The actor's reply. Raises ProcessDied."""
        import ray

        self._busy_since = time.monotonic()
        try:
            reply: Reply = json.loads(ray.get(self.actor.answer.remote(json.dumps(request))))
            return reply
        except ray.exceptions.RayError as error:
            raise ProcessDied(self._reason or f"was lost: {words_of(error)}", own=False) from None
        finally:
            self._busy_since = None

    def end(self, reason: str = "") -> None:
        import ray

        self._reason = reason or self._reason
        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(self.actor)

    def close(self, patience: float) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.get(self.actor.close.remote(), timeout=patience)
        self.end()


class RayActor:
    """The worker's side: built in a process that Ray started."""

    def __init__(self, root: str, cwd: str, log: str) -> None:
        if Path(cwd).is_dir():
            os.chdir(cwd)
            sys.path.append(cwd)
        if Path(log).parent.is_dir():  # the run's, unless this node does not see it
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            os.close(descriptor)
        self.server = import_module("raftune.runtime.worker").WorkerServer(root)

    def answer(self, request: str) -> str:
        return json.dumps(self.server.answer(json.loads(request)))

    def close(self) -> None:
        self.server.close()


class RayCluster:
    """Starts actors on the cluster that `engine.address` names."""

    def __init__(self, config: EngineConfig, root: Path) -> None:
        if find_spec("ray") is None:
            raise ConfigError(
                "engine.kind: ray needs the package ray, which is not installed: pip install 'raftune[ray]'."
            )
        self.config, self.root = config, root
        self.address = config.address or "auto"
        self._connected = False

    def open(self) -> tuple[str, ...]:
        """Connects to the cluster, or starts one here. A connection that the process already has is used."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its warning about that is not for users
        if self.address == "local":
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # read at the import: listen on 127.0.0.1
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        if not ray.is_initialized():
            self._connect(ray)
        return self._room(ray)

    def _connect(self, ray: Any) -> None:
        if self.address.startswith("ray://"):
            raise ConfigError(
                f"engine.address must be that of the cluster itself; got {self.address!r}, a Ray Client's. Run on a "
                "node of the cluster and write auto, or HOST:PORT of its head (port 6379 unless changed)."
            )
        self._check_reachable()
        options: dict[str, Any] = {"address": self.address}
        if self.address == "local":
            cpus = max(os.cpu_count() or 1, int(self.config.workers * self.config.resources.get("CPU", 1)))
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            ray.init(**options, log_to_driver=False, configure_logging=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            token = "" if self.address == "auto" else " (it answers: is the token right, in RAY_AUTH_TOKEN?)"
            raise self._unreachable(f"{words_of(error)}{token}") from error
        finally:
            for number, handler in handlers.items():  # ray.init replaces those of the command
                with contextlib.suppress(ValueError):  # not in the main thread
                    signal.signal(number, handler)
        self._connected = True
        log = self.root / "tmp" / "ray.log"

        def write(data: dict[str, Any], **_: Any) -> None:
            with contextlib.suppress(OSError), log.open("a") as file:
                file.writelines(f"{line}\n" for line in data["lines"])

        ray._private.worker.print_to_stdstream = write  # what Ray says of the cluster, which it prints to stdout

    def _check_reachable(self) -> None:
        """Raises EngineError for an address that nobody listens on: Ray would try for minutes."""
        address = os.environ.get("RAY_ADDRESS", "auto") if self.address == "auto" else self.address
        if address in ("auto", "local"):
            return
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"engine.address must be auto, local or HOST:PORT; got {self.address!r}.") from error
        except OSError as error:
            raise self._unreachable(str(error)) from error

    def _unreachable(self, reason: str) -> EngineError:
        return EngineError(
            f"engine.address: no connection to the Ray cluster at {self.address!r}: {reason}. Start it (`ray start`), "
            "correct the address (HOST:PORT), or write local for a cluster on this machine."
        )

    def _room(self, ray: Any) -> tuple[str, ...]:
        """A note if fewer workers fit than are configured. Raises ConfigError if none does."""
        needs = self._resources()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(min(int(node.get(name, 0) // need) for name, need in needs.items()) for node in nodes)
        asked = ", ".join(f"{name}: {need:g}" for name, need in needs.items())
        if not room:
            most = ", ".join(f"{name}: {max(node.get(name, 0) for node in nodes):g}" for name in needs)
            raise ConfigError(
                f"engine.resources must fit on a node of the Ray cluster; got {{{asked}}}, and the most that a node "
                f"has is {{{most}}}. Lower them, or add such a node."
            )
        if room < self.config.workers:
            return (f"the Ray cluster has room for {room} of {self.config.workers} workers with {{{asked}}}",)
        return ()

    def _resources(self) -> dict[str, float]:
        needs = {"CPU": 1.0, **self.config.resources}
        return {name: need for name, need in needs.items() if need}

    def start(self, slot: int) -> RayWorker:
        import ray

        threads, needs = str(self.config.threads), {"CPU": 1.0, **self.config.resources}
        variables = passed_variables()
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "RAFTUNE_WORKER": str(slot)}
        actor = ray.remote(RayActor).options(
            num_cpus=needs.pop("CPU"),
            num_gpus=needs.pop("GPU", 0),
            resources=needs,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": variables},
        )
        log = self.root.resolve() / "tmp" / f"worker-{slot}.log"
        return RayWorker(actor.remote(str(self.root.resolve()), str(Path.cwd()), str(log)))

    def waiting_for(self) -> str:
        return "the Ray cluster has the resources, but others use them (`ray status` shows them). Wait, or add nodes."

    def close(self) -> None:
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False


def passed_variables() -> dict[str, str]:
    """The environment variables that actors get from this process; no secrets, since all users of Ray can see these."""
    names = [name for name, value in os.environ.items() if PASSED.match(name) and not is_secret(name, value)]
    return {name: os.environ[name] for name in names if name != MARK}


def words_of(error: BaseException) -> str:
    """The error in one line: Ray's texts are paragraphs."""
    return first_line(error).rstrip(".:")


def ray_engine(config: EngineConfig, root: Path) -> Engine:
    """A pool of actors."""
    return WorkerPool(config, root, RayCluster(config, root))
