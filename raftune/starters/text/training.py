"""What building the starter's two models shares: tokenizer, encoding, optimizer, sampling, saving. Needs torch."""

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY: Final = 1400
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
MAX_POSITIONS: Final = 256


def say(line: str) -> None:
    print(line, flush=True)


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


class Descent:
    """AdamW on one model, with a short warm-up and a cosine down to a fiftieth of the rate; says how the loss falls."""

    def __init__(self, name: str, model: torch.nn.Module, rate: float, steps: int) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_factor(step, steps))
        self.step = 0
        self.recent: list[float] = []

    def advance(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.recent.append(loss.item())
        if self.step % 100 == 0:
            say(f"{self.name} step {self.step}: loss {np.mean(self.recent):.3f}")
            self.recent.clear()


def rate_factor(step: int, steps: int) -> float:
    """The share of the full rate at a step."""
    warm = max(1, min(100, steps // 10))
    progress = min(1.0, max(0, step - warm) / max(1, steps - warm))
    return min((step + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


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
        say(f"sampled {len(found)} of {len(prompts)} prompts")
    return found


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Half-precision weights declared as float32: half the bytes, and whoever loads them computes in full precision."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
