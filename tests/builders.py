"""Tiny real models and tokenizers, built in milliseconds: what the tests of the language-model family run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raftune.policies.quiet import quiet

PAD, BOS, EOS = 0, 1, 2
# "ab" is one token, and so is "a" followed by "b": text does not determine ids, which is what tests of exact ids need.
MERGES = [("a", "b"), ("t", "h"), ("th", "e")]
VOCABULARY = 3 + 256 + len(MERGES) + 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}{% if loud is defined and loud %}!{% endif %}"
)


def tiny_tokenizer(
    *, bos: bool = False, pad: bool = True, eos: bool = True, chat: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with three merges; `bos` puts <s> before every text, `chat` adds a template."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in MERGES)]
    inner = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    special = {"bos_token": "<s>", **({"eos_token": "</s>"} if eos else {}), **({"pad_token": "<pad>"} if pad else {})}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Two layers of width 32, grouped-query heads 4:2, a context of 128 tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **_ids(), "initializer_range": 0.2, **changes})).eval()


def tiny_gpt2(seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """Two layers of width 32, learned positions, tied embeddings, and GPT-2's usual dropout of 0.1."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **_ids(), "initializer_range": 0.2, **changes})).eval()


def tiny_qwen2(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Two layers of width 32 with attention biases, grouped-query heads 4:2, tied embeddings."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": True}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **heads, **_ids(), "initializer_range": 0.2, **changes})).eval()


def _ids() -> dict[str, int]:
    return {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


BUILDERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


def tiny_model(arch: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return BUILDERS[arch](seed, **changes)


def save_tiny(folder: Path, arch: str = "llama", *, seed: int = 0, chat: bool = False, bos: bool = False) -> Path:
    """A folder that transformers loads: random weights of the named architecture and the tiny tokenizer."""
    with quiet():
        tiny_model(arch, seed).save_pretrained(folder)
        tiny_tokenizer(bos=bos, chat=chat).save_pretrained(folder)
    return folder
