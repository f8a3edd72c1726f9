"""Runs that generate through a real vLLM on the CPU, of the environment whose Python RAFTUNE_VLLM_PYTHON names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftune.config.sampling import VllmBackend
from raftune.engines.process import MARK
from raftune.errors import EngineError
from raftune.policies.causal_lm.sampling.vllm import ServedModel, VllmServer
from raftune.runtime.run import run, verify
from raftune.training.quiet import quiet
from tests.builders import Killed, tiny_llama, tiny_tokenizer
from tests.runs.test_causal_lm_runs import OBJECTS, config, tree
from tests.runs.test_generation_servers import dying_at, generated

PYTHON = os.environ.get("RAFTUNE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON, reason="RAFTUNE_VLLM_PYTHON names no environment with vLLM"),
]
STARTED = {"kind": "vllm", "python": PYTHON, "args": ["--enforce-eager"]}
KEY = "VLLM_TEST_KEY"
SCRIPT = """
import json, sys
from raftune.runtime.run import run
from tests.runs.test_causal_lm_runs import OBJECTS
run(json.load(open(sys.argv[1])), OBJECTS)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads of size 32, the smallest that vLLM has; its embeddings are not tied."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    with quiet():
        tiny_llama(0, **sizes).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return folder


def settings(root: Path, llama: Path, backend: dict[str, Any], **sections: Any) -> dict[str, Any]:
    sampling = {"backend": backend, "num_generations": 4, "max_completion_length": 12, "chunk_size": 4}
    return config(root, llama, sampling=sampling, training={"num_train_epochs": 1}, **sections)


def test_adapters_reach_the_server_that_raftune_starts_and_a_killed_run_leaves_none_and_ends_with_the_same_bytes(
    tmp_path: Path, llama: Path
) -> None:
    lora = {"policy": {"adapter": {"r": 4}}}
    run(settings(tmp_path / "whole", llama, STARTED, **lora), OBJECTS)
    assert not verify(tmp_path / "whole")
    record = json.loads((tmp_path / "whole/round-0000/parity/backend.json").read_text())["server"]
    assert (record["kind"], record["device"], record["reproducible"]) == ("vllm", "cpu", True)
    root, file = tmp_path / "cut", tmp_path / "cut.json"
    file.write_text(json.dumps(settings(root, llama, STARTED, **lora)))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file)], env={**os.environ, MARK: "of the test"})
    deadline = time.monotonic() + 600
    while not list(root.glob("round-0002/generate/*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    started = children_of(process.pid)  # what watches the server, the server, its engine and its worker
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(started) > 3 and not (root / "round-0002/generate/_COMMIT.json").exists()
    while any(map(command_of, started)):
        assert time.monotonic() < deadline, "the server outlived its run"
        time.sleep(0.1)
    run(settings(root, llama, STARTED, **lora), OBJECTS)
    assert tree(root) == tree(tmp_path / "whole")
    assert len(generated(root, "round-0002/generate")) == 32


def children_of(pid: int) -> list[int]:
    """The process's children, theirs, and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children_of(child)]
    return found


def command_of(pid: int) -> bytes:
    """The command of a process; empty where there is none, or it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def running(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The backend's section for a vLLM that runs already and reads new weights into its memory."""
    options = VllmBackend(python=PYTHON, args=("--enforce-eager",))
    tmp = tmp_path_factory.mktemp("vllm")
    server = VllmServer(options, tmp, cuda=False, dtype="float32", threads=1, lora_rank=0, length=128, trust=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv(KEY, server.key)
        try:
            server.load(ServedModel(str(llama), None, str(llama), None, "start"))
            yield {"kind": "vllm", "url": f"http://127.0.0.1:{server.port}", "key_env": KEY, "reproducible": True}
        finally:
            server.end()


def test_whole_weights_are_read_into_a_running_server_and_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, llama: Path, running: dict[str, Any]
) -> None:
    run(settings(tmp_path / "whole", llama, running), OBJECTS)
    with pytest.raises(Killed):
        run(settings(tmp_path / "cut", llama, running), OBJECTS, observe=dying_at("generate", 0))
    run(settings(tmp_path / "cut", llama, running), OBJECTS)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole") and not verify(tmp_path / "whole")


def test_a_server_that_keeps_its_old_weights_is_caught(tmp_path: Path, llama: Path, running: dict[str, Any]) -> None:
    backend = {**running, "kind": "openai"}  # nobody tells it of new weights
    with pytest.raises(EngineError, match=r"must serve the model of this round; it differs"):
        run(settings(tmp_path, llama, backend), OBJECTS)
    assert not generated(tmp_path, "round-0001/evaluate/generate")


def test_the_reason_why_a_server_does_not_start_is_named(tmp_path: Path, llama: Path) -> None:
    backend = {**STARTED, "args": ["--no-such-flag"]}
    with pytest.raises(EngineError, match=r"vLLM ended with code 2: .*unrecognized arguments: --no-such-flag"):
        run(settings(tmp_path, llama, backend), OBJECTS)
