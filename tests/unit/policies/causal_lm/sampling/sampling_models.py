"""What the generation is tested on: tiny random models of several architectures, a tokenizer of characters, and
prompts.

Weights are spread wide (`initializer_range` 0.4), so that the best token is far from the second and greedy search can
be compared token for token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from raftune.policies.causal_lm.sampling.backend import choose_backend
from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
from raftune.policies.causal_lm.weight_probe import rows_of_prompts

VOCABULARY = 97
CONTEXT = 128

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
} | _SPECIAL


def llama(**changes: object) -> PreTrainedModel:
    """Four query heads over two key/value heads."""
    return _ready(lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE | {"num_key_value_heads": 2} | changes)))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **_SPECIAL)
    return _ready(lambda: GPT2LMHeadModel(config))


def biased_llama() -> PreTrainedModel:
    return _with_biases(llama(attention_bias=True, mlp_bias=True))


def qwen3() -> PreTrainedModel:
    """Norms of queries and keys, and a head size of its own."""
    return _ready(lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE | {"num_key_value_heads": 2, "head_dim": 12})))


def qwen2() -> PreTrainedModel:
    return _ready(lambda: _with_biases(Qwen2ForCausalLM(Qwen2Config(**_SHAPE | {"num_key_value_heads": 2}))))


def gpt_neox() -> PreTrainedModel:
    return _ready(lambda: _with_biases(GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE))))


def mistral(window: int | None) -> PreTrainedModel:
    return _ready(
        lambda: MistralForCausalLM(MistralConfig(**_SHAPE | {"num_key_value_heads": 2, "sliding_window": window}))
    )


def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, **_SPECIAL)
    return _ready(lambda: MambaForCausalLM(config))


def _ready(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return build().eval()


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Biases start at zero, where a sample that forgot them would not be noticed."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, size=length).tolist() for length in lengths]


def path_of(model: PreTrainedModel, settings: SamplingParams, longest: int | None = None) -> tuple[str, str]:
    """How the model generates, as a trial on two prompts finds it, and why."""
    rows = rows_of_prompts(prompts(12, 7))
    return choose_backend(model, rows, settings).path(model, settings, longest)


def seeds(*counts: int) -> list[list[int]]:
    """63-bit seeds, as a run gives them: counts[i] for prompt i."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 2**63, size=count).tolist() for count in counts]


def characters(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Ids are characters, from 'a' on; the last four are the bytes of one emoji."""
    pieces = [chr(97 + i) if i < 26 else chr(0x400 + i) for i in range(size - 4)]
    pieces += [f"<0x{byte:02X}>" for byte in "🙂".encode()]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="a"))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core)
