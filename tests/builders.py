"""Tiny real models and tokenizers, built in milliseconds: what the tests of the language-model family run on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from raftune.config.policy import AdapterConfig, CausalLMPolicy
from raftune.config.sampling import SamplingConfig
from raftune.config.training import TrainingConfig
from raftune.protocols import Chunk
from raftune.records import Prompt, derive_seed
from raftune.training.quiet import quiet

torch.set_num_threads(1)  # two threads for models of this size cost more than they give, and tests share their machine

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


@dataclass(frozen=True)
class Parts:
    """What of a run's configuration the causal-LM family reads."""

    policy: CausalLMPolicy
    sampling: SamplingConfig
    training: TrainingConfig
    seed: int = 0


def parts(model: Path | str, *, lora: bool = False, seed: int = 0, **changes: Any) -> Parts:
    """Short answers, a high rate, batches of four; `changes` are fields of any section, by name."""
    adapter = AdapterConfig(r=4, alpha=8.0) if lora else None
    given = {
        "model": str(model),
        "device": "cpu",
        "adapter": adapter,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
    }
    given |= {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 1, "batch_size": 8, **changes}
    sections = [CausalLMPolicy, SamplingConfig, TrainingConfig]
    chosen = [section(**{k: v for k, v in given.items() if k in section.model_fields}) for section in sections]
    assert set(given) <= {k for section in sections for k in section.model_fields}, given
    return Parts(*chosen, seed)


def chunk_of(contents: Sequence[Any], k: int = 4, batch_size: int = 8) -> Chunk:
    """A chunk of these prompts, named p0, p1, …, with K seeds each."""
    prompts = tuple(Prompt(f"p{i}", content) for i, content in enumerate(contents))
    seeds = tuple(tuple(derive_seed("generate", p.id, j) for j in range(k)) for p in prompts)
    return Chunk(0, "round-0001", "round-0000", prompts, seeds, batch_size)


ROWS = pa.schema(
    [
        *(("sample_id", pa.string()), ("prompt_id", pa.string()), ("prompt", pa.string()), ("weight", pa.float64())),
        *(("origin", pa.string()), ("source", pa.string()), ("completion", pa.string())),
        *(("completion_ids", pa.list_(pa.int32())), ("completion_logprobs", pa.list_(pa.float32()))),
        ("finish", pa.string()),
    ]
)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], round_: int = 1) -> Path:
    """What the stage `gather` writes; `rows` need prompt and completion_ids, and what differs from the usual."""
    usual = {"weight": 1.0, "origin": "round-0001", "source": "policy", "completion": "", "finish": "eos"}
    named = [{"sample_id": f"s{i}", "prompt_id": row["prompt"], **usual, **row} for i, row in enumerate(rows)]
    schema = ROWS.with_metadata({"raftune.round": str(round_)})
    pq.write_table(pa.Table.from_pylist(named, schema=schema), path)
    return path


def tiny_distilbert(seed: int = 0, **changes: Any) -> DistilBertForMaskedLM:
    """Two layers of width 32, 128 positions: an encoder that reads its number at the first token."""
    torch.manual_seed(seed)
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "initializer_range": 0.2}
    return DistilBertForMaskedLM(DistilBertConfig(**{**sizes, **ids, **changes})).eval()


def tiny_roberta(seed: int = 0, **changes: Any) -> RobertaForMaskedLM:
    """Two layers of width 32; of its 128 positions the first is the padding token's, so that 127 tokens fit."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaForMaskedLM(
        RobertaConfig(**{**sizes, **_ids(), "max_position_embeddings": 128, "initializer_range": 0.2, **changes})
    ).eval()


def encoder_tokenizer(*, eos: bool) -> PreTrainedTokenizerFast:
    """The tiny tokenizer as encoders have it: <s> before every text to read the number at, </s> behind it."""
    made = tiny_tokenizer(eos=eos)
    special = [("<s>", BOS), ("</s>", EOS)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    made.cls_token, made.sep_token = "<s>", "</s>"
    return made


def save_backbone(folder: Path, arch: str, *, chat: bool = False) -> Path:
    """As `save_tiny`, also for the encoders distilbert (which knows no EOS) and roberta (whose SEP is its EOS)."""
    if arch in BUILDERS:
        return save_tiny(folder, arch, chat=chat)
    with quiet():
        (tiny_roberta() if arch == "roberta" else tiny_distilbert()).save_pretrained(folder)
        encoder_tokenizer(eos=arch == "roberta").save_pretrained(folder)
    return folder


def clip_tokenizer(limit: int = 16) -> CLIPTokenizer:
    """A token a letter, apart from two merges; a text of more than `limit` tokens is too long for the encoder."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("r", "e"), ("re", "d</w>")]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=limit)


def tiny_clip_model(seed: int = 0, limit: int = 16) -> CLIPModel:
    """Random weights: width 16, one layer each, 16 px in patches of 8, texts of 16 tokens, a space of 12 numbers."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer(limit)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes, **ids, "max_position_embeddings": limit, "vocab_size": len(tokenizer), "initializer_factor": 8.0}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "initializer_factor": 4.0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def clip_image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def tiny_clip(folder: Path, seed: int = 0, limit: int = 16) -> Path:
    """A folder with a CLIPModel of random weights, its image processor and its tokenizer."""
    with quiet():
        tiny_clip_model(seed, limit).save_pretrained(folder)
        clip_image_processor().save_pretrained(folder)
        clip_tokenizer(limit).save_pretrained(folder)
    return folder


def tree_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under the folder, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Killed(BaseException):
    """Stands for a process that ends: nothing in the package may catch it."""


class KillAfter(TrainerCallback):
    """Ends the fit as soon as the checkpoint of `step` is whole."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed
