"""What generates gives the log-probabilities of what was trained, or nothing is generated."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sampling_models import VOCABULARY, llama, prompts, seeds
from transformers import RwkvConfig, RwkvForCausalLM

from raftune.config.policy import AdapterConfig
from raftune.errors import ConfigError, ModelError
from raftune.policies.causal_lm import CausalLM, loading
from raftune.policies.causal_lm.likelihood import TokenizedCompletion
from raftune.policies.causal_lm.loading import fresh_adapter
from raftune.policies.causal_lm.sampling.backend import choose_backend, generate, replay
from raftune.policies.causal_lm.sampling.parity import check_parity
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import (
    adapter_survives_merging,
    measure,
    plain_log_probs,
    probe_of_fit,
    read_probe,
    rows_of_prompts,
)
from raftune.stages.parity import generation_words
from raftune.store import partial
from tests.builders import chunk_of, parts, save_tiny, tiny_llama, write_rows
from tests.unit.policies.causal_lm.fits import some_rows, trained

TEXTS = ("the cab", "so", "a bath then")
SETTINGS = SamplingParams(max_completion_length=10)


@pytest.fixture(scope="module")
def round_1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """Configuration, model folder and start folder of a fit of an adapter on tied embeddings."""
    root = tmp_path_factory.mktemp("parity")
    adapter = AdapterConfig(r=4, alpha=8.0, target_modules=("q_proj", "lm_head"))
    config = parts(save_tiny(root / "base", "qwen2"), adapter=adapter, learning_rate=0.1)
    out, _ = trained(config, root, write_rows(root / "rows.parquet", some_rows()))
    return config, out, root / "round-0000" / "model"


def test_training_leaves_a_probe_of_its_own_rows(round_1: tuple[Any, Path, Path]) -> None:
    config, out, start = round_1
    probe = read_probe(out)
    assert probe is not None
    rows = [tuple(row["completion_ids"]) for row in some_rows()]
    assert {tuple(ids) for ids in probe.completions} <= set(rows)
    assert max(map(len, rows)) in map(len, probe.completions)  # the longest tell most
    assert probe.noise < 1e-5 and probe.allowed == 1e-3
    model = CausalLM.load(config, out, start).model
    assert probe.distance(plain_log_probs(model, probe.examples, 0)) < 1e-4
    assert probe.distance(plain_log_probs(tiny_llama(5), probe.examples, 0)) > 0.1


def test_a_model_that_is_not_the_one_that_was_trained_generates_nothing(
    round_1: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out, start = round_1
    assert len(CausalLM.load(config, out, start).generate(chunk_of(TEXTS))) == 12
    monkeypatch.setattr(loading, "untie_targets", lambda model: None)  # then merging changes the embeddings as well
    with pytest.raises(ModelError, match=r"differs from what training ended with by \d\S* nats a token"):
        CausalLM.load(config, out, start).generate(chunk_of(TEXTS))


def test_a_way_of_generating_that_is_wrong_is_refused_although_the_weights_are_right(
    round_1: tuple[Any, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from raftune.policies.causal_lm.sampling.kv_cache import KVCache

    config, out, start = round_1
    policy = CausalLM.load(config, out, start)
    policy.use_backend({"forked": "", "rows": 0, "distances": {}, "noise": 0.0, "allowed": 1e-3})
    attend = KVCache.attend
    monkeypatch.setattr(KVCache, "attend", lambda self, layer, query, scaling: attend(self, layer, query, 2 * scaling))
    with pytest.raises(ModelError, match="through the shared-prefix cache"):
        policy.generate(chunk_of(TEXTS))


def test_a_recorded_way_of_generating_is_taken_again(tmp_path: Path) -> None:
    config = parts(save_tiny(tmp_path / "base"))
    CausalLM.start(config, tmp_path / "start")
    policy = CausalLM.load(config, tmp_path / "start", tmp_path / "start")
    record = policy.choose_backend(list(chunk_of(TEXTS).prompts))
    assert record["forked"] == "" and record["distances"]["fused"] < record["allowed"] == 1e-3
    assert json.loads(json.dumps(record)) == record == policy.backend()
    assert record["way"] == "fused"
    again = CausalLM.load(config, tmp_path / "start", tmp_path / "start")
    again.use_backend({**record, "forked": "somebody measured"})
    again.generate(chunk_of(TEXTS))
    assert any("somebody measured" in note for note in again.notes())


def rwkv() -> RwkvForCausalLM:
    """An architecture whose batches transformers gets wrong: two equal rows have different logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=VOCABULARY, context_length=64, **sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model


def test_a_model_whose_batches_are_wrong_is_generated_from_one_row_at_a_time() -> None:
    model = rwkv()
    backend = choose_backend(model, rows_of_prompts(prompts(12, 7)), SETTINGS)
    assert backend.path(model, SETTINGS)[0] == backend.way == "single"
    assert "one row at a time" in generation_words(asdict(backend))
    assert backend.distances["generate"] > 0.1 > 1e-3 > backend.distances["single"]
    samples = generate(model, None, prompts(5, 5), seeds(2, 2), SETTINGS)
    for prompt, group in zip(prompts(5, 5), samples, strict=True):
        for sample in group:
            [wanted] = plain_log_probs(model, [TokenizedCompletion.of(prompt, sample.ids)], 0)
            assert sample.logprobs == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ConfigError, match="generation_kwargs must be left out"):
        backend.path(model, SamplingParams(generation_kwargs={"num_beams": 2}))


def adapted(std: float) -> Any:
    """A 16-bit model under an adapter whose weights are of this size."""
    model = fresh_adapter(llama().to(torch.bfloat16), AdapterConfig(r=4, alpha=8.0), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=std)
    return model.eval()


@pytest.mark.parametrize(("std", "survives"), [(1e-4, False), (0.1, True)])
def test_an_adapter_is_merged_into_16_bit_weights_where_these_can_hold_it(std: float, survives: bool) -> None:
    assert adapter_survives_merging(adapted(std)) is survives
    rows = rows_of_prompts(prompts(12, 7))
    assert probe_of_fit(adapted(std), rows, None, 0).merge is survives


def test_noise_of_16_bit_batches_is_no_mismatch_and_another_adapter_is_one() -> None:
    model, rows = adapted(0.3), rows_of_prompts(prompts(12, 7, 9))
    probe = measure(model, rows, 0)
    assert choose_backend(model, rows, SETTINGS).path(model, SETTINGS)[0] == "forked"
    check_parity(probe, replay("forked", model, probe, SETTINGS), "here")
    with pytest.raises(ModelError, match="nats a token"):
        check_parity(probe, plain_log_probs(adapted(0.0), rows, 0), "without its adapter")


def test_a_check_in_the_middle_of_a_chunk_neither_reads_nor_writes_what_the_chunk_is_continued_from(
    tmp_path: Path,
) -> None:
    model, rows = llama(), rows_of_prompts(prompts(12, 7))
    probe = measure(model, rows, 0)
    with partial.unfinished_work(tmp_path / "generate", tmp_path, "chunk-00000", "key", {}):
        chunk = partial.current("forked")
        chunk.save(lambda path: path.write_bytes(b"what the chunk came to"))
        left = chunk.find()
        assert probe.distance(replay("forked", model, probe, SETTINGS)) < 1e-3
        assert left is not None and chunk.find() == left
