"""Over a dozen architectures, full and under LoRA: what generating records is what a plain forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sampling_models import VOCABULARY, prompts, seeds
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from raftune.config.policy import AdapterConfig
from raftune.policies.causal_lm.likelihood import TokenizedCompletion
from raftune.policies.causal_lm.loading import fresh_adapter, merged
from raftune.policies.causal_lm.sampling.backend import choose_backend, generate
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import plain_log_probs, rows_of_prompts

SETTINGS = SamplingParams(max_completion_length=8, eos_ids=(2,))
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# The configuration's name, what differs from the usual, and how such a model generates.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "fused"),
    "llama, tied": ("llama", {"tie_word_embeddings": True}, "fused"),
    "qwen2": ("qwen2", {}, "fused"),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, "fused"),
    "mistral, a window of 6": ("mistral", {"sliding_window": 6}, "generate"),
    "gemma2": ("gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 8}, "generate"),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 8}, "generate"),
    "phi3": ("phi3", {}, "forked"),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "forked"),
    "gpt_neox": ("gpt_neox", {}, "forked"),
    "olmo2": ("olmo2", {}, "forked"),
    "mixtral": ("mixtral", EXPERTS, "forked"),
    "qwen3_moe": ("qwen3_moe", EXPERTS, "forked"),
    "phimoe": ("phimoe", EXPERTS, "forked"),
    "mamba": ("mamba", {"state_size": 4}, "generate"),
    "rwkv": ("rwkv", {"attention_hidden_size": 32, "context_length": 64}, "single"),
}


def built(name: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    config = CONFIG_MAPPING[name](**{**USUAL, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what starts at zero or one would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generated_log_probs_are_those_of_a_plain_forward(name: str, lora: bool) -> None:
    kind, changes, path = ARCHITECTURES[name]
    model = trained = built(kind, changes)
    if lora:
        trained = fresh_adapter(built(kind, changes), AdapterConfig(r=2, alpha=4.0), 0)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model = fresh_adapter(built(kind, changes), AdapterConfig(r=2, alpha=4.0), 0)
        model.load_state_dict(trained.state_dict())
        model = merged(model).eval()
    backend = choose_backend(model, rows_of_prompts(prompts(12, 9)), SETTINGS)
    way, reason = backend.path(model, SETTINGS)
    assert way == path, reason
    for prompt, group in zip(
        prompts(9, 5), generate(model, None, prompts(9, 5), seeds(2, 2), SETTINGS, way), strict=True
    ):
        for sample in group:
            [wanted] = plain_log_probs(trained, [TokenizedCompletion.of(prompt, sample.ids)], 0)
            assert sample.logprobs == pytest.approx(wanted, abs=1e-4)
