"""Runs that generate through inference servers: right ones, and wrong ones in every way that is told apart."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raftune.config import validate
from raftune.errors import ConfigError, EngineError
from raftune.planning import forecast
from raftune.runtime.run import resume, run, verify
from raftune.stages.parity import generation_words
from tests.builders import Killed, save_tiny
from tests.runs.completions_server import CompletionsService, completions_server
from tests.runs.test_causal_lm_runs import OBJECTS, config, tree

Server = tuple[str, CompletionsService]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture
def server(llama: Path) -> Iterator[Server]:
    with completions_server(llama) as (url, service):
        yield url, service


def served(root: Path, llama: Path, url: str, kind: str = "vllm", **sections: Any) -> dict[str, Any]:
    """A short run through a server; `backend` are further options of it."""
    backend = {"kind": kind, "url": url, "retries": 1, "reproducible": True, **sections.pop("backend", {})}
    sampling = {"backend": backend, "num_generations": 2, "max_completion_length": 6, **sections.pop("sampling", {})}
    usual = {"prompts_per_round": 4, "sampling": sampling, "training": {"num_train_epochs": 1}}
    return config(root, llama, **(usual | sections))


def generated(root: Path, stage: str) -> list[dict[str, Any]]:
    return [row for path in sorted((root / stage).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def dying_at(stage: str, chunk: int) -> Callable[[str, dict[str, Any]], None]:
    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and (facts["stage"], facts["chunk"]) == (stage, chunk):
            raise Killed

    return observe


@pytest.mark.slow
def test_adapters_are_loaded_under_names_of_their_own_and_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path, llama: Path, server: Server
) -> None:
    url, service = server
    lora = {"policy": {"adapter": {"r": 2}}, "sampling": {"chunk_size": 2}}
    run(served(tmp_path / "whole", llama, url, **lora), OBJECTS)
    assert service.log.count("/v1/load_lora_adapter") == 2  # one a round
    root = tmp_path / "cut"
    with pytest.raises(Killed):
        run(served(root, llama, url, **lora), OBJECTS, observe=dying_at("generate", 0))
    run(served(root, llama, url, **lora), OBJECTS)
    assert tree(root) == tree(tmp_path / "whole") and not verify(root)
    rows = generated(root, "round-0002/generate")
    assert {row["finish"] for row in rows} <= {"eos", "length"} and len({row["seed"] for row in rows}) == len(rows) == 8
    record = json.loads((root / "round-0000/parity/backend.json").read_text())
    assert generation_words(record) == "vLLM 1.2.3, float32; a seed gives the same bytes"
    assert "reproducible" not in json.loads((root / "round-0001/generate/_COMMIT.json").read_text())


@pytest.mark.slow
def test_whole_weights_are_reloaded_and_a_server_that_keeps_its_old_ones_is_caught(
    tmp_path: Path, llama: Path, server: Server
) -> None:
    url, service = server
    service.fault = "stale"
    with pytest.raises(EngineError, match=r"must serve the model of this round; it differs .*nearer to that.*Nothing"):
        run(served(tmp_path, llama, url), OBJECTS)
    assert not (tmp_path / "round-0001/evaluate/generate/unit-00000.parquet").exists()
    assert service.log.count("/collective_rpc") == service.log.count("/reset_prefix_cache") == 1
    service.fault = ""
    assert resume(tmp_path, OBJECTS).rounds == 2 and not verify(tmp_path)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_of_a_chunk_leaves_a_run_that_resumes(
    tmp_path: Path, llama: Path, server: Server
) -> None:
    url, service = server
    run(served(tmp_path / "whole", llama, url), OBJECTS)
    service.load("tiny", str(llama), adapter=False)
    service.dies_after = service.requests + 30
    with pytest.raises(EngineError, match=r"broke off: .* \(2 tries\)"):
        run(served(tmp_path / "cut", llama, url), OBJECTS)
    service.dies_after, service.dead = float("inf"), False
    run(served(tmp_path / "cut", llama, url), OBJECTS)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_weights_of_a_server_that_others_change_come_by_a_command_or_the_run_says_where_they_are(
    tmp_path: Path, llama: Path, server: Server
) -> None:
    url, _ = server
    with pytest.raises(EngineError, match=r"Load .*round-0001/model there\. sampling\.backend\.update may name"):
        run(served(tmp_path, llama, url, "openai"), OBJECTS)
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, httpx2\nurl, folder = sys.argv[1:]\nbody = {'kwargs': {'weights_path': folder}}\n"
        "assert httpx2.post(url.removesuffix('/v1') + '/collective_rpc', json=body).is_success, 'not loaded'\n"
    )
    update = {"update": [sys.executable, str(script), "{url}", "{folder}"]}
    assert run(served(tmp_path, llama, url, "openai", backend=update), OBJECTS).rounds == 2
    broken = {"update": [sys.executable, "-c", "raise SystemExit('no room')"]}
    again = served(tmp_path / "broken", llama, url, "openai", backend=broken)
    with pytest.raises(EngineError, match=r"sampling\.backend\.update: .* ended with code 1: no room"):
        run(again, OBJECTS)


@pytest.mark.slow
def test_prompts_are_spread_over_servers_also_where_workers_do_the_rest(tmp_path: Path, llama: Path) -> None:
    with completions_server(llama) as (url, one), completions_server(llama) as (other, two):
        backend = {"url": [url, other], "reproducible": False}
        settings = {"policy": {"adapter": {"r": 2}}, "selection": {"beta": 0.1}, "engine": {"workers": 2}}
        rewards = {"reward_funcs": [{"spec": "length", "options": {"target": 5}}]}
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(f'{{"prompt": "say {word}"}}\n' for word in "abcdefghijkl"))
        run(
            served(
                tmp_path / "run",
                llama,
                url,
                backend=backend,
                **settings,
                rewards=rewards,
                data={"prompts": str(prompts)},
            )
        )
    assert abs(one.requests - two.requests) < 20 < min(one.requests, two.requests)
    manifest = json.loads((tmp_path / "run/round-0001/generate/_COMMIT.json").read_text())
    assert manifest["reproducible"] is False and "1.2.3" in manifest["fields"]["hash of server"]
    assert not verify(tmp_path / "run")


@pytest.mark.slow
def test_another_model_behind_the_address_and_another_version_are_named_when_a_run_is_resumed(
    tmp_path: Path, llama: Path, server: Server
) -> None:
    url, service = server
    with pytest.raises(Killed):
        run(served(tmp_path, llama, url), OBJECTS, observe=dying_at("evaluation generate", 0))
    service.fault = "another name"
    with pytest.raises(ConfigError, match=r"must be a model that .* serves \(another\)"):
        run(served(tmp_path, llama, url, backend={"model": "tiny"}), OBJECTS)
    service.fault = ""
    record = tmp_path / "round-0000/parity/backend.json"
    assert json.loads(record.read_text())["server"]["version"] == "1.2.3"


@pytest.mark.slow
def test_a_plan_asks_a_server_for_its_models_only(tmp_path: Path, llama: Path, server: Server) -> None:
    url, service = server
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "say {word}"}}\n' for word in "abcdefghijkl"))
    rewards = {"reward_funcs": [{"spec": "length", "options": {"target": 5}}]}
    planned = validate(served(tmp_path / "run", llama, url, data={"prompts": str(prompts)}, rewards=rewards))
    assert "not started to plan" in str(forecast(planned)) and service.requests == 0


def test_a_family_that_generates_in_its_own_way_has_no_server(tmp_path: Path) -> None:
    from tests.runs import tiny

    with pytest.raises(ConfigError, match=r"sampling\.backend must be auto for policy\.family: tabular"):
        run(
            tiny.config(tmp_path, sampling={"backend": {"kind": "openai", "url": "http://127.0.0.1:9"}}), tiny.objects()
        )
