"""The family as the loop sees it: draws with ids and seeds in order, adopts, scores, and says what one should know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raftune.errors import DataError, ModelError, OutOfMemory
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm import policy as module
from raftune.protocols import SupportsLogProbs
from raftune.records import Prompt, samples_table
from tests.builders import EOS, chunk_of, parts, save_tiny, tiny_tokenizer

TEXTS = ("the cab", "so", "a bath then")


def policy_of(root: Path, arch: str = "llama", chat: bool = False, **changes: Any) -> CausalLM:
    model = root / f"model-{arch}"
    if not model.exists():
        save_tiny(model, arch, chat=chat)
    config = parts(model, **changes)
    start = root / "round-0000" / "model"
    CausalLM.start(config, start)
    return CausalLM.load(config, start, start)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_a_chunk_gives_k_samples_a_prompt_in_order(tmp_path: Path, arch: str) -> None:
    chunk = chunk_of(TEXTS, k=3)
    samples = policy_of(tmp_path, arch).generate(chunk)
    assert [(s.prompt_id, s.k) for s in samples] == [(f"p{i}", k) for i in range(3) for k in range(3)]
    assert [s.seed for s in samples] == [seed for seeds in chunk.seeds for seed in seeds]
    assert samples[4].id == "round-0001/p1/001"
    assert {s.version for s in samples} == {"round-0000"}
    assert {s.source for s in samples} == {"policy"}
    assert len({s.completion for s in samples}) > 5


def test_the_text_is_the_ids_decoded_and_an_end_is_kept_in_the_ids(tmp_path: Path) -> None:
    samples = policy_of(tmp_path, max_completion_length=30).generate(chunk_of(TEXTS, k=20))
    tokenizer = tiny_tokenizer()
    for sample in samples:
        ids = sample.payload["completion_ids"]
        assert sample.completion == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) == len(sample.payload["completion_logprobs"]) <= 30
        assert (ids[-1] == EOS) == (sample.payload["finish"] == "eos")
    assert {s.payload["finish"] for s in samples} == {"eos", "length"}


def test_samples_fit_the_payload_schema(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    table = samples_table(policy.generate(chunk_of(TEXTS)), policy.payload)
    assert table.schema.names[-4:] == ["completion", "completion_ids", "completion_logprobs", "finish"]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_log_probs_are_the_sums_of_those_recorded_in_generation(tmp_path: Path, arch: str) -> None:
    policy, chunk = policy_of(tmp_path, arch, temperature=0.7, few_shot_prefix="Q: "), chunk_of(TEXTS)
    assert isinstance(policy, SupportsLogProbs)
    table = samples_table(policy.generate(chunk), policy.payload)
    prompts = [chunk.prompts[int(name[1:])] for name in table.column("prompt_id").to_pylist()]
    recorded = [sum(row) for row in table.column("completion_logprobs").to_pylist()]
    np.testing.assert_allclose(policy.log_probs(prompts, table, 5), recorded, atol=2e-4)


def test_the_prefix_changes_what_is_generated(tmp_path: Path) -> None:
    chunk = chunk_of(TEXTS, k=8)
    plain, prefixed = (policy_of(tmp_path, few_shot_prefix=p).generate(chunk) for p in (None, "Answer: "))
    assert [s.completion for s in plain] != [s.completion for s in prefixed]


def test_messages_are_generated_for_beside_texts(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, chat=True)
    samples = policy.generate(chunk_of(["so", [{"role": "user", "content": "so"}]], k=2))
    assert len(samples) == 4
    assert samples[0].payload["completion_logprobs"][0] != samples[2].payload["completion_logprobs"][0]


def test_a_prompt_without_room_for_a_completion_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    with pytest.raises(DataError, match=r"prompt p0 .* has 200 tokens, the limit is 127"):
        policy.generate(chunk_of(["x" * 200]))
    assert policy._model is None


def test_an_encoded_completion_is_ids_with_eos_and_no_log_probs(tmp_path: Path) -> None:
    adopted = policy_of(tmp_path).encode_completion(Prompt("p", "so"), "the cab", "column:human")
    ids = [*tiny_tokenizer()("the cab")["input_ids"], EOS]
    assert adopted == {
        "completion": "the cab", "completion_ids": ids, "completion_logprobs": None, "finish": "eos",
    }  # fmt: skip


def test_generation_through_generate_is_reported_once(tmp_path: Path) -> None:
    forked = policy_of(tmp_path)
    forked.generate(chunk_of(TEXTS))
    assert forked.notes() == ()
    beams = policy_of(tmp_path, generation_kwargs={"no_repeat_ngram_size": 2})
    for _ in range(2):
        beams.generate(chunk_of(TEXTS))
    assert len(beams.notes()) == 1
    assert "no_repeat_ngram_size" in beams.notes()[0]


@pytest.mark.slow
def test_stop_texts_and_every_eos_of_the_generation_config_end_a_completion(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model-llama")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 9, 11], "transformers_version": "5.0.0"}')
    policy = policy_of(tmp_path, max_completion_length=40, stop=("a",))
    assert policy.eos_ids == (2, 9, 11)
    samples = policy.generate(chunk_of(TEXTS, k=30))
    ends = {s.payload["completion_ids"][-1] for s in samples if s.payload["finish"] == "eos"}
    assert ends <= {2, 9, 11} and len(ends) > 1
    assert any(s.payload["finish"] == "stop" and "a" in s.completion for s in samples)


def test_a_full_memory_names_the_chunks_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(policy.model), "forward", full)
    with pytest.raises(OutOfMemory) as caught:
        policy.generate(chunk_of(TEXTS, batch_size=6))
    assert caught.value.batch_size == 6


def test_training_releases_the_weights_that_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(tmp_path)
    policy.generate(chunk_of(TEXTS))
    held = []

    def look(*args: Any) -> None:
        held.append(policy._model)
        raise ModelError("seen enough")

    monkeypatch.setattr(module.loading, "load_round", look)
    from tests.builders import write_rows

    rows = write_rows(tmp_path / "r.parquet", [{"prompt": "a", "completion_ids": [5, 2]}])
    with pytest.raises(ModelError, match="seen enough"):
        policy.train(rows, tmp_path / "work", tmp_path / "out")
    assert held == [None]


def test_greedy_samples_of_an_adapter_are_those_of_peft(tmp_path: Path) -> None:
    """The adapter is merged to generate; what is generated is what the adapter itself says."""
    from peft import AutoPeftModelForCausalLM

    from tests.builders import write_rows

    policy = policy_of(tmp_path, lora=True, temperature=0.0, learning_rate=5e-2, num_train_epochs=4)
    rows = write_rows(tmp_path / "r.parquet", [{"prompt": t, "completion_ids": [9, 70, 71, 2]} for t in TEXTS])
    out = tmp_path / "round-0001" / "model"
    policy.train(rows, tmp_path / "work", out)
    generated = CausalLM.load(policy.config, out, tmp_path / "round-0000" / "model").generate(chunk_of(TEXTS, k=1))
    plain = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    for text, sample in zip(TEXTS, generated, strict=True):
        ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
        full = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert full[0, ids.shape[1] :].tolist() == sample.payload["completion_ids"]
