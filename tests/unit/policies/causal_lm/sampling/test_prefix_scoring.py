"""Several completions of a prompt are scored from one pass over it, and have the log-probabilities of whole rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_models import VOCABULARY, gpt2, gpt_neox, llama, mistral, qwen2
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from raftune.config.policy import AdapterConfig
from raftune.errors import OutOfMemory
from raftune.policies.causal_lm import CausalLM
from raftune.policies.causal_lm import policy as policies
from raftune.policies.causal_lm.likelihood import TokenizedCompletion, log_probs
from raftune.policies.causal_lm.loading import fresh_adapter
from raftune.policies.causal_lm.sampling import shared_prefix
from raftune.policies.causal_lm.sampling.backend import choose_backend
from raftune.policies.causal_lm.sampling.shared_prefix import prefix_log_probs
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import rows_of_prompts
from raftune.records import samples_table
from tests.builders import chunk_of, parts, save_tiny

SETTINGS = SamplingParams(max_completion_length=12)
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_experts() -> Any:
    """Tokens take different ways through the layers."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**SMALL, **experts, initializer_range=0.4)).eval()


def whose_logits_are_scaled() -> Any:
    """The head's output is not yet the logits: the whole model has to run."""
    torch.manual_seed(0)
    sizes = {"num_key_value_heads": 2, "intermediate_size": 32, "logits_scaling": 3.0, "initializer_range": 0.4}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING["granite"](**SMALL, **sizes)).eval()


def with_an_adapter() -> Any:
    model = fresh_adapter(llama(), AdapterConfig(r=4), 0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 if "lora_B" in name else 0)
    return model


MODELS = (llama, gpt2, qwen2, gpt_neox, with_experts, whose_logits_are_scaled, with_an_adapter)


def ragged(prompts: tuple[int, ...] = (9, 1, 17, 5), longest: int = 12) -> list[TokenizedCompletion]:
    """Five completions for each prompt, from none to `longest` tokens, in no order; one prompt is a single token."""
    random = np.random.default_rng(0)
    rows = []
    for length in prompts:
        prompt = random.integers(3, VOCABULARY, length)
        sizes = [0, 1, longest, *random.integers(1, longest, 2)]
        rows += [TokenizedCompletion.of(prompt, random.integers(3, VOCABULARY, size)) for size in sizes]
    return [rows[index] for index in random.permutation(len(rows))]


@pytest.mark.parametrize("build", MODELS)
def test_log_probs_are_those_of_whole_rows(build: Any) -> None:
    model, rows = build(), ragged()
    wanted = log_probs(model, rows, 100, 0)
    assert (wanted == 0).sum() == 4  # completions without a token
    for batch_size in (1, 3, 100):
        np.testing.assert_allclose(prefix_log_probs(model, rows, batch_size), wanted, atol=1e-4)


def test_every_prompt_token_is_read_once_and_every_completion_token_at_most_once() -> None:
    model, rows = llama(), ragged()
    counted = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, inputs, out: counted.append(inputs[0].numel()))
    prefix_log_probs(model, rows, 1)  # batches of a prompt each: none is padded
    handle.remove()
    trial = 2 * 8  # of the head and the backbone, on two rows of four
    last = sum(row.tokens > 0 for row in rows)  # nothing is predicted from a last token
    assert sum(counted) - trial == (9 + 1 + 17 + 5) + sum(row.tokens for row in rows) - last


def test_a_prompt_of_very_many_completions_is_read_again_after_a_batch_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "LEAST_ROWS", 2)
    model, rows = llama(), ragged()
    np.testing.assert_allclose(prefix_log_probs(model, rows, 1), log_probs(model, rows, 100, 0), atol=1e-4)


def test_completions_without_a_token_are_certain() -> None:
    assert prefix_log_probs(
        llama(), [TokenizedCompletion.of([5, 6], []), TokenizedCompletion.of([5, 6], [])], 4
    ).tolist() == [0, 0]
    assert prefix_log_probs(llama(), [], 4).shape == (0,)


def test_attention_and_mode_of_the_model_are_left_as_they_were() -> None:
    model = gpt2().train()
    before = model.config._attn_implementation
    first, second = (prefix_log_probs(model, ragged(), 4) for _ in range(2))
    assert model.training and model.config._attn_implementation == before
    assert np.array_equal(first, second)  # without the dropout that training has


def test_a_full_memory_names_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(shared_prefix, "prefill", full)
    with pytest.raises(OutOfMemory, match=r"sampling\.batch_size") as caught:
        prefix_log_probs(llama(), ragged(), 5)
    assert caught.value.batch_size == 5


# -- which way a run takes --------------------------------------------------------------------------------------------


def test_a_trial_on_the_run_s_prompts_admits_it_within_a_window_and_not_beyond() -> None:
    model = mistral(16)
    backend = choose_backend(model, rows_of_prompts([[5, 6, 7, 8]]), replace(SETTINGS, max_completion_length=4))
    assert backend.scoring == "" and backend.distances["scoring"] < 1e-4
    assert backend.scores_by_prefix(model, 16) and not backend.scores_by_prefix(model, 17)


def test_a_model_for_which_it_would_be_wrong_is_scored_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = shared_prefix.PrefixCache.attend
    monkeypatch.setattr(
        shared_prefix.PrefixCache, "attend", lambda self, q, k, v, scaling: attend(self, q, k, v, 2 * scaling)
    )
    backend = choose_backend(llama(), rows_of_prompts([[5, 6, 7, 8, 9, 10], [7, 8, 9]]), SETTINGS)
    assert "nats a token" in backend.scoring and backend.distances["scoring"] > 1e-3
    assert not backend.scores_by_prefix(llama(), 20)
    assert backend.forked == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each pass over samples took."""
    taken: list[str] = []
    for name in ("log_probs", "prefix_log_probs"):
        plain = getattr(policies, name)
        monkeypatch.setattr(policies, name, lambda *args, name=name, plain=plain: taken.append(name) or plain(*args))
    return taken


def test_what_a_run_recorded_decides_and_not_what_was_generated_before(
    folder: Path, tmp_path: Path, passes: list[str]
) -> None:
    config = parts(folder, max_completion_length=6)
    CausalLM.start(config, tmp_path)
    first, again, without, older = (CausalLM.load(config, tmp_path, tmp_path) for _ in range(4))
    chunk = chunk_of(["the bath", "a"], k=3)
    record = first.choose_backend(chunk.prompts)
    again.use_backend(record)
    older.use_backend({name: record[name] for name in ("forked", "rows", "distances", "noise", "allowed")})
    samples = without.generate(chunk)  # which makes a trial of its own
    table = samples_table(samples, without.payload)
    prompts = [prompt for prompt in chunk.prompts for _ in range(3)]
    values = [policy.log_probs(prompts, table, 4) for policy in (first, again, without, older)]
    assert passes == ["prefix_log_probs"] * 2 + ["log_probs"] * 2
    assert np.array_equal(values[0], values[1]) and np.array_equal(values[2], values[3])
    np.testing.assert_allclose(values[0], values[2], atol=1e-4)
    assert again.log_probs(prompts[::3], table.take([0, 3]), 4) == pytest.approx(values[2][::3], abs=1e-4)
    assert passes[-1] == "log_probs", "one completion a prompt: there is nothing to share"
