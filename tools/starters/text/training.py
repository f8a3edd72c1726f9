"""What building the starter's two models shares: tokenizer, encoding, sampling, saving. Needs torch."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raftune.store.files import dump_json
from tools.starters.optimizer import emit

VOCABULARY: Final = 1400
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MAX_POSITIONS: Final = 256


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS first; EOS is left to whoever encodes a reply."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts))["input_ids"]
    return ids


def pad_right(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def llama_config(tokenizer: PreTrainedTokenizerFast, **shape: Any) -> LlamaConfig:
    """A small Llama's shape: four heads that share two sets of keys, embeddings tied to the head."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    k: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[str]]:
    """`k` continuations of each prompt."""
    torch.manual_seed(seed)
    found: list[list[str]] = []
    for start in range(0, len(prompts), 64):
        chosen = list(prompts[start : start + 64])
        inputs = tokenizer(chosen, return_tensors="pt", padding=True, padding_side="left")
        ids = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=k,
            max_new_tokens=80,
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [texts[i * k : (i + 1) * k] for i in range(len(chosen))]
        emit(f"sampled {len(found)} of {len(prompts)} prompts")
    return found


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half-precision weights declared as float32: half the bytes, and whoever loads them computes in full precision."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    dump_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
