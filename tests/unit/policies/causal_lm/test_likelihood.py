"""Log-probabilities are those of the exact ids under the whole model, however they are batched and computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from raftune.config.policy import AdapterConfig
from raftune.errors import OutOfMemory
from raftune.policies.causal_lm import likelihood
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, collate, log_probs
from raftune.policies.causal_lm.loading import fresh_adapter
from tests.builders import PAD, VOCABULARY, tiny_model

ARCHITECTURES = ("llama", "gpt2", "qwen2")


def examples(count: int = 7, seed: int = 0) -> list[TokenizedCompletion]:
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 20, size=(count, 2))
    return [
        TokenizedCompletion.of(random.integers(3, VOCABULARY, a), random.integers(3, VOCABULARY, b)) for a, b in sizes
    ]


def by_hand(model: Any, example: TokenizedCompletion) -> float:
    """The definition, one row at a time: the sum of log-softmax at the positions before the completion's tokens."""
    ids = torch.from_numpy(example.ids.astype(np.int64))
    with torch.no_grad():
        steps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return float(sum(steps[i - 1, ids[i]] for i in range(example.start, len(ids))))


def softcapped() -> Gemma2ForCausalLM:
    """A model whose logits are not the head's output alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": 3.0}
    config = Gemma2Config(vocab_size=VOCABULARY, initializer_range=0.5, pad_token_id=PAD, **sizes, **heads)
    return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_sum_is_that_of_the_whole_model_row_by_row(arch: str) -> None:
    model, rows = tiny_model(arch), examples()
    found = log_probs(model, rows, 3, PAD)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [by_hand(model, row) for row in rows], atol=2e-4)


def test_the_batch_size_does_not_matter_beyond_rounding() -> None:
    model, rows = tiny_model("llama"), examples()
    np.testing.assert_allclose(log_probs(model, rows, 1, PAD), log_probs(model, rows, 100, PAD), atol=2e-4)


def test_what_the_padding_holds_does_not_matter() -> None:
    model, rows = tiny_model("llama"), examples()
    assert np.array_equal(log_probs(model, rows, 7, PAD), log_probs(model, rows, 7, VOCABULARY - 1))


def test_the_head_in_slices_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), examples()
    whole = log_probs(model, rows, 7, PAD)
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 3 * VOCABULARY)
    np.testing.assert_allclose(log_probs(model, rows, 7, PAD), whole, atol=1e-4)


def test_no_examples_have_no_log_probs() -> None:
    assert log_probs(tiny_model("llama"), [], 4, PAD).shape == (0,)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("lora", [False, True])
def test_the_head_is_distinguished_from_the_backbone_where_they_make_up_the_model(arch: str, lora: bool) -> None:
    model = tiny_model(arch)
    if lora:
        model = fresh_adapter(model, AdapterConfig(r=4), 0).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(0.1 if "lora_B" in name else 0)
    assert CompletionLogits(model).parts is not None
    rows = examples()
    np.testing.assert_allclose(log_probs(model, rows, 3, PAD), [by_hand(model, row) for row in rows], atol=5e-4)


def test_a_model_that_bends_its_logits_is_run_whole() -> None:
    model, rows = softcapped(), examples()
    assert CompletionLogits(model).parts is None
    np.testing.assert_allclose(log_probs(model, rows, 3, PAD), [by_hand(model, row) for row in rows], atol=2e-4)


def test_scoring_is_without_dropout_and_leaves_the_mode_of_the_model_alone() -> None:
    model = tiny_model("gpt2").train()
    first, second = (log_probs(model, examples(), 4, PAD) for _ in range(2))
    assert model.training
    assert np.array_equal(first, second)  # without the dropout that training has


def test_a_batch_names_each_completion_token_and_the_position_before_it() -> None:
    batch = collate([TokenizedCompletion.of([5, 6], [7, 8]), TokenizedCompletion.of([9], [4])], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["positions"].tolist() == [1, 2, 4]
    assert batch["targets"].tolist() == [7, 8, 4]


def test_a_full_memory_names_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(likelihood, "token_log_probs", full)
    with pytest.raises(OutOfMemory, match=r"sampling\.batch_size") as caught:
        log_probs(model, examples(), 5, PAD)
    assert caught.value.batch_size == 5  # of the five rows that were alive
