"""Which way a sample goes is decided by what the model does, and said."""

from __future__ import annotations

import pytest
import torch
from sampling_models import VOCABULARY, gpt2, llama, mamba, mistral, path_of
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from raftune.policies.causal_lm.sampling.backend import BackendChoice
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams

SETTINGS = SamplingParams(max_completion_length=30)
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def assert_through_generate(model: nn.Module, settings: SamplingParams, longest: int | None, because: str) -> None:
    path, reason = path_of(model, settings, longest)
    assert path == "generate"
    assert because in reason


@pytest.mark.parametrize("model", [llama, gpt2])
def test_full_attention_uses_the_shared_prefix(model: type) -> None:
    assert path_of(model(), SETTINGS)[0] == {llama: "fused", gpt2: "forked"}[model]


def test_a_sliding_window_uses_the_shared_prefix_only_where_the_context_stays_inside_it() -> None:
    model = mistral(40)
    assert path_of(model, SETTINGS, 10)[0] == "fused"
    assert_through_generate(model, SETTINGS, 11, "a layer sees the last 40 tokens only, within a context of 41")
    assert_through_generate(model, SETTINGS, None, "within a context of 128")


def test_a_recurrent_state_has_no_shared_prefix() -> None:
    assert_through_generate(mamba(), SETTINGS, 10, "recurrent state")


def test_an_encoder_has_no_shared_prefix() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    path, reason = BackendChoice("", 0, {}, 0, 1).path(t5, SETTINGS, 10)
    assert (path, reason) == ("generate", "it attends to an encoder")
    crossing = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    assert_through_generate(GPT2LMHeadModel(crossing), SETTINGS, 10, "encoder")


def test_attention_with_more_than_queries_keys_and_values_has_no_shared_prefix() -> None:
    capped = Gemma2Config(**SMALL, sliding_window=64, attn_logit_softcapping=5.0, pad_token_id=0)
    assert_through_generate(Gemma2ForCausalLM(capped).eval(), SETTINGS, 10, "softcap")
    sinks = GptOssConfig(
        **SMALL, sliding_window=64, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0, eos_token_id=2
    )
    assert_through_generate(GptOssForCausalLM(sinks).eval(), SETTINGS, 10, "s_aux")


def test_options_of_generate_alone_go_through_generate() -> None:
    beams = SamplingParams(generation_kwargs={"num_beams": 4, "no_repeat_ngram_size": 2})
    assert_through_generate(llama(), beams, 10, "no_repeat_ngram_size, num_beams are generate's own")
    assert path_of(llama(), SamplingParams(generation_kwargs={"use_cache": True}))[0] == "fused"


def test_rotary_frequencies_that_depend_on_the_batch_use_no_shared_prefix_beyond_their_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 50}
    model = llama(rope_parameters=rope)
    assert path_of(model, SETTINGS, 20)[0] == "fused"
    assert_through_generate(model, SETTINGS, 21, "change beyond 50 tokens")


def _leaning(module: nn.Module, query: Tensor, key: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
    """Attention that scales its queries: nothing in a configuration tells of it."""
    return sdpa_attention_forward(module, query * 1.5, key, *args, **kwargs)  # type: ignore[arg-type]


def test_a_trial_finds_attention_that_differs_from_ours() -> None:
    AttentionInterface.register("raftune_test_leaning", _leaning)
    model: PreTrainedModel = llama(attn_implementation="raftune_test_leaning")
    assert_through_generate(model, SETTINGS, 10, "gave other log-probabilities")


def test_asking_for_the_path_leaves_the_model_as_it_was() -> None:
    model = llama().train()
    random_state = torch.random.get_rng_state()
    path_of(model, SETTINGS)
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(torch.random.get_rng_state(), random_state)
