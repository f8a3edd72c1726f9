"""Servers that answer wrongly are named; right ones are asked with everything explicit, and checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raftune.config import EngineConfig, SamplingConfig
from raftune.errors import ConfigError, EngineError, RaftuneError
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.server import Servers, check_servers, servers_of
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.sampling.vllm import ServedModel
from raftune.policies.causal_lm.weight_probe import WeightProbe, measure, rows_of_prompts
from tests.builders import EOS, parts, save_tiny
from tests.runs.completions_server import CompletionsService, completions_server

PROMPTS = [[5, 6, 7, 8, 9, 10], [40, 41, 42, 43]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def probe(llama: Path) -> WeightProbe:
    return measure(CausalLM.load(parts(llama), llama, llama).model, rows_of_prompts(PROMPTS), 0)


@pytest.fixture(scope="module")
def running(llama: Path) -> Iterator[tuple[str, CompletionsService]]:
    with completions_server(llama) as (url, service):
        yield url, service


@pytest.fixture
def service(running: tuple[str, CompletionsService]) -> Iterator[CompletionsService]:
    yield running[1]
    running[1].fault = ""


def configured(folder: Path, **backend: Any) -> Any:
    """What of a run's configuration the servers read."""
    given = parts(folder)
    sampling = SamplingConfig(backend=backend, max_completion_length=6)  # type: ignore[arg-type]
    return SimpleNamespace(policy=given.policy, sampling=sampling, engine=EngineConfig(threads=1))


def servers(folder: Path, url: str, tmp: Path, **backend: Any) -> Servers:
    found = servers_of(configured(folder, **{"kind": "openai", "url": url, "retries": 1, **backend}), folder, tmp)
    assert found is not None
    return found


def model_at(folder: Path) -> ServedModel:
    return ServedModel(str(folder), None, str(folder), None, "0123abcd")


FAULTS = {
    "500": r"answered HTTP 500: EngineCore encountered an issue\. \(2 tries\)",
    "400": r"answered HTTP 400: prompt is too long",
    "hangs": r"gave no answer within 0\.2 s \(2 tries\)",
    "no ids": r"must give the token ids of a completion \(`return_token_ids`\); got none",
    "no log-probs": r"must give the log-probabilities of a completion",
    "few log-probs": r"must give a log-probability for each token; got 0 for 1",
    "nan": r"must give finite log-probabilities",
    "ignores n": r"must give one completion a request; got 2: it ignores `n`",
    "ignores max_tokens": r"must give 1 to 1 token ids \(`max_tokens`\); got",
    "ignores seed": r"must use the `seed` of a request; it gives other completions for equal seeds",
    "one for all seeds": r"must use the `seed` of a request; it gives one completion for all seeds",
    "log-probs after temperature": r"must give log-probabilities of the model itself, before temperature",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_answers_wrongly_is_named_before_a_run_takes_it(
    tmp_path: Path, llama: Path, probe: WeightProbe, running: tuple[str, Any], service: CompletionsService, fault: str
) -> None:
    service.fault = fault
    timeout = {"timeout": 0.2} if fault == "hangs" else {}
    with pytest.raises(EngineError, match=FAULTS[fault]):
        servers(llama, running[0], tmp_path, **timeout).begin(model_at(llama), probe)


LATER = {
    "unknown ids": r"must give ids of the model's 264 tokens; got 1000000\. It serves another model",
    "ends early": r"must go on to an end of text, a stop string or max_tokens = 6; it ended after",
    "": "",
}


@pytest.mark.parametrize("fault", LATER)
def test_a_completion_is_recorded_if_its_ids_and_its_end_can_be_the_models(
    tmp_path: Path, llama: Path, probe: WeightProbe, running: tuple[str, Any], service: CompletionsService, fault: str
) -> None:
    used = servers(llama, running[0], tmp_path)
    assert used.begin(model_at(llama), probe)["version"] == "1.2.3"
    settings = SamplingParams(max_completion_length=6, eos_ids=(EOS,))
    batch = CompletionBatch(None, PROMPTS, [[1, 2], [3, 4]], settings, used.context)
    service.fault = fault
    if fault:
        with pytest.raises(EngineError, match=LATER[fault]):
            used.fill(batch, model_at(llama), probe)
        return
    used.fill(batch, model_at(llama), probe)
    groups = batch.completions()
    assert all(len(c.ids) == 6 or c.finish == "eos" for group in groups for c in group)
    assert len({tuple(c.ids) for group in groups for c in group}) == 4


def test_a_request_that_fails_is_tried_again(
    tmp_path: Path, llama: Path, probe: WeightProbe, running: tuple[str, Any], service: CompletionsService
) -> None:
    service.fault, service.requests = "500 once", 0
    assert not servers(llama, running[0], tmp_path).begin(model_at(llama), probe)["reproducible"]


def test_a_server_of_other_weights_is_refused(
    tmp_path: Path, llama: Path, probe: WeightProbe, running: tuple[str, Any], service: CompletionsService
) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=3)
    changed = measure(CausalLM.load(parts(other), other, other).model, rows_of_prompts(PROMPTS), 0)
    with pytest.raises(EngineError, match=r"must serve the model of this round; it differs .*Load .*other there"):
        servers(llama, running[0], tmp_path).begin(model_at(other), changed)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            {"url": "http://127.0.0.1:9"},
            r"sampling\.backend\.url: http://127.0.0.1:9/v1 cannot be reached.*Start the server",
        ),
        ({"model": "large"}, r"sampling\.backend\.model must be a model that .* serves \(tiny\); got 'large'"),
        ({"key_env": "NO_KEY_HERE"}, r"key_env names 'NO_KEY_HERE', which is not set"),
        ({"url": "ftp://host"}, r"sampling\.backend\.url must be a URL that begins with http"),
        ({"kind": "vllm", "url": [], "python": "/no/python"}, r"python must be the Python of an env.*'/no/python'"),
        ({"kind": "vllm", "url": []}, r"vLLM is not installed in raftune's own environment\. .*python: /path"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_before_the_run(
    llama: Path, running: tuple[str, Any], backend: dict[str, Any], message: str
) -> None:
    with pytest.raises(RaftuneError, match=message):
        check_servers(configured(llama, **({"kind": "openai", "url": running[0]} | backend)))


def test_four_bits_and_options_of_another_kind_of_server_are_refused(llama: Path) -> None:
    config = configured(llama, kind="openai", url="http://127.0.0.1:9")
    config.policy = config.policy.model_copy(update={"load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"sampling\.backend must be auto here: with policy\.load_in_4bit"):
        check_servers(config)
    for backend, message in (
        ({"kind": "openai"}, "url must name a server"),
        ({"kind": "auto", "url": "http://h"}, "url is an option of vllm and openai"),
        ({"kind": "vllm", "update": ["load"]}, "update is an option of servers that run already"),
        ({"kind": "vllm", "url": "http://h", "python": "/p"}, "python is an option of a server that raftune starts"),
        ({"kind": "vllm", "args": ["--port=3"]}, "args must not hold --port, which raftune sets"),
        ({"kind": "vllm", "gpu_memory": 90}, "gpu_memory is wrong: input should be less than or equal to 1"),
        ({"kind": "vllm", "pythn": "/p"}, "pythn is not a field"),
    ):
        with pytest.raises(ValueError, match=f"sampling.backend.{message}"):
            SamplingConfig(backend=backend)  # type: ignore[arg-type]


def test_auto_takes_raftunes_own_generation_without_a_gpu_and_says_why(llama: Path, tmp_path: Path) -> None:
    config = configured(llama, kind="openai", url="http://127.0.0.1:9")
    config.sampling = SamplingConfig()
    found = servers_of(config, llama, tmp_path)
    assert found is not None and found.chosen() == (False, "not vLLM: no GPU is used")


def python_with_vllm(folder: Path, version: str) -> str:
    """An interpreter in whose environment vLLM seems to be installed in this version."""
    info = folder / "site" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "site" / "vllm.py").write_text("raise SystemExit('nothing of vLLM is loaded')")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_auto_takes_vllm_where_it_is_installed_and_a_gpu_is_there(llama: Path, tmp_path: Path) -> None:
    def chosen(version: str, planning: bool = False) -> tuple[bool, str]:
        config = configured(llama, kind="auto", python=python_with_vllm(tmp_path / f"{version}-{planning}", version))
        found = servers_of(config, llama, tmp_path)
        assert found is not None and found.own is not None
        found.own.cuda, found.against, found.planning = True, "", planning
        return found.chosen()

    assert chosen("0.11.0") == (True, "vLLM 0.11.0 is installed and a GPU is there")
    taken, why = chosen("0.11.0", planning=True)
    assert not taken and why.startswith("vLLM generates in the run, and is not started to plan")
    taken, why = chosen("0.9.2")
    assert not taken and why.startswith("not vLLM: vLLM in the environment of ") and "0.10.2 or later" in why


def test_where_a_server_is_and_how_it_is_asked_does_not_enter_a_run_s_keys() -> None:
    from raftune.config.sampling import shaping

    near, far = (
        SamplingConfig(backend={"kind": "vllm", "url": url, "timeout": t})  # type: ignore[arg-type]
        for url, t in (("http://a", 5), ("http://b", 6))
    )
    assert shaping(near) == shaping(far) == ("sampling.backend_options.args",)
    assert shaping(SamplingConfig()) == ("sampling.backend_options",)
    assert SamplingConfig(**json.loads(near.model_dump_json())) == near
