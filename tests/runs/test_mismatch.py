"""Every round compares the log-probabilities that were recorded while generating with the trainer's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raftune.policies.causal_lm.sampling.backend import generate
from raftune.report.collect import collect
from raftune.report.provenance import generation
from raftune.results.round_metrics import sample_stats
from raftune.results.status import status_of
from raftune.results.summary import alarms_of
from raftune.runtime.run import run
from raftune.store.run import RunFolder
from tests.builders import save_tiny
from tests.runs.completions_server import completions_server
from tests.runs.test_causal_lm_runs import OBJECTS, config
from tests.runs.test_generation_servers import served


class OffByHalfANat:
    """Generates as raftune does, and records log-probabilities that are half a nat too high."""

    reproducible = True

    def generate(self, model: Any, request: Any) -> Any:
        groups = generate(model, request.tokenizer, request.prompts, request.seeds, request.parameters)
        return [[c._replace(logprobs=[nats + 0.5 for nats in c.logprobs]) for c in group] for group in groups]


def small(root: Path, tmp_path: Path, **sections: Any) -> dict[str, Any]:
    evaluation = {"num_prompts": 0}
    return config(root, save_tiny(tmp_path / "base"), evaluation=evaluation, **sections)


def measured(root: Path, round_: int) -> dict[str, Any]:
    return dict(
        json.loads((root / f"round-000{round_}" / "model" / "training.json").read_text())["details"]["mismatch"]
    )


@pytest.mark.parametrize(
    "sections",
    [
        {
            "sampling": {"system_prompt": "Be brief."},
            "policy": {"adapter": {"r": 2}},
            "training": {"learning_rate": 0.05},
        },
        {"sampling": {"backend": "hf_generate"}, "training": {"start_from": "start", "learning_rate": 0.05}},
    ],
    ids=["shared prefix, a system prompt, an adapter", "hf_generate, each round from the start"],
)
def test_what_raftune_records_is_what_the_trainer_computes(tmp_path: Path, sections: dict[str, Any]) -> None:
    root = tmp_path / "run"
    run(small(root, tmp_path, **sections), OBJECTS)
    for round_ in (1, 2):
        facts = measured(root, round_)
        assert 0 < facts["mean"] <= facts["p99"] <= facts["max"] < 1e-4 < facts["allowed"] == 1e-3
        assert facts["completions"] == 4 and facts["tokens"] >= facts["completions"]
        assert "log_probs_mismatch" not in [alarm["alarm"] for alarm in alarms_of(RunFolder(root), round_)]
    words = f"recorded log-probabilities of the newest round {measured(root, 2)['mean']:.0e} nats a token"
    assert words in status_of(root).generation
    assert words in generation(collect(root).reader)
    stats, _ = sample_stats(RunFolder(root), 2)
    assert stats["sampling/sampling_logp_difference/mean"] == measured(root, 2)["mean"]
    guard = json.loads((root / "round-0002" / "guard" / "metrics.json").read_text())
    assert guard["generated"]["mismatch_p99"] == measured(root, 2)["p99"]


@pytest.mark.slow
def test_a_server_that_reads_right_and_generates_with_old_weights_raises_the_alarm(tmp_path: Path) -> None:
    """As one does whose prefix cache outlives its weights: the weight probe, which is read, finds nothing."""
    root, folder = tmp_path / "run", save_tiny(tmp_path / "base")
    with completions_server(folder) as (url, service):
        service.fault = "stale prefixes"
        run(served(root, folder, url, evaluation={"num_prompts": 0}, training={"learning_rate": 0.01}), OBJECTS)
    alarms = [[alarm["alarm"] for alarm in alarms_of(RunFolder(root), round_)] for round_ in (1, 2)]
    assert ["log_probs_mismatch" in names for names in alarms] == [False, True]
    assert measured(root, 1)["max"] < 1e-4 < 0.01 < measured(root, 2)["mean"]
    assert "vLLM 1.2.3, float32; a seed gives the same bytes; recorded log-prob" in status_of(root).generation


def test_a_backend_whose_log_probs_are_wrong_raises_an_alarm_that_can_end_the_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    backend = {"sampling": {"backend": f"{__name__}:OffByHalfANat"}, "guards": {"stop_on": ["log_probs_mismatch"]}}
    run(small(root, tmp_path, **backend), OBJECTS)
    assert not (root / "round-0002").exists()
    [alarm] = [alarm for alarm in alarms_of(RunFolder(root), 1) if alarm["alarm"] == "log_probs_mismatch"]
    assert "0.5 nats a token" in alarm["evidence"]
    assert alarm["numbers"]["mean"] == pytest.approx(0.5, abs=1e-3) == alarm["numbers"]["p99"]
    assert len(alarm["samples"]) == 4 and alarm["samples"][0]["sample_id"].startswith("0001/")
    assert "a backend of your own; recorded log-probabilities" in status_of(root).generation
