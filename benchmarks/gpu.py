"""What raftune does on one GPU: generation, log-probabilities, training, images, whole rounds, QLoRA, exact resume.

    benchmarks/gpu.sh                             all parts, in under six minutes
    benchmarks/gpu.sh --parts generate-7b,images --minutes 3 --out gpu.json
    benchmarks/gpu.sh --size tiny                 the same in small, on a CPU too

Models have random weights in the shapes of real ones (Llama of 0.5B and 7B parameters, the UNet of SDXL), so that
nothing is fetched. Each part is a process of its own with a time limit: one that fails, hangs or fills the memory
leaves the others, and what it had measured until then counts. Generation, log-probabilities and images are timed in a
second call, after one that warms up; training from its second step on. No completion ends early: each has all tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

PAD = 0


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    llamas: dict[str, dict[str, int]]  # transformers' LlamaConfig
    prompts: dict[str, int]  # asked at once, by model
    k: int
    prompt_tokens: int
    new_tokens: int
    train_rows: int
    steps: int  # of training, timed
    unet: dict[str, Any]  # diffusers' UNet2DConditionModel
    vae: dict[str, Any]
    text: tuple[dict[str, int], dict[str, int]]  # the two CLIP text encoders
    pixels: int
    denoising_steps: int
    images: int


_HALF_B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936,
}  # fmt: skip
_SEVEN_B = {
    "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32_000,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096,
}  # fmt: skip
_SDXL_UNET = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True, "in_channels": 4, "out_channels": 4,
}  # fmt: skip
_TINY_UNET = _SDXL_UNET | {
    "sample_size": 8, "block_out_channels": (16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 1, 1), "attention_head_dim": (2, 2, 2), "cross_attention_dim": 32,
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 6 + 16,
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 1024,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.13025, "force_upcast": False,
}  # fmt: skip
_TINY_VAE = _VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 4}

SIZES = {
    "full": Size(
        {"0.5b": _HALF_B, "7b": _SEVEN_B}, {"0.5b": 32, "7b": 8}, 8, 250, 128, 64, 8, _SDXL_UNET, _VAE,
        ({"hidden_size": 768, "num_attention_heads": 12}, {"hidden_size": 1280, "num_attention_heads": 20}),
        1024, 20, 4,
    ),
    "tiny": Size(
        {"0.5b": _TINY, "7b": _TINY}, {"0.5b": 2, "7b": 2}, 2, 12, 6, 8, 2, _TINY_UNET, _TINY_VAE,
        ({"hidden_size": 16, "num_attention_heads": 2}, {"hidden_size": 16, "num_attention_heads": 2}),
        64, 2, 2,
    ),
}  # fmt: skip


# -- rows of the table -------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measure: ours, and the others' by name."""

    what: str
    unit: str
    ours: float | str | None = None
    others: dict[str, float | str] = field(default_factory=dict)
    note: str = ""


class Rows:
    """The rows of a part, in a file as soon as they are there."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.write_text(json.dumps([asdict(row) for row in self.rows]))


def table(results: list[dict[str, Any]]) -> str:
    lines = [("part", "measure", "raftune", "others", "note")]
    for result in results:
        for row in result["rows"]:
            others = ", ".join(f"{name} {number(value)}" for name, value in row["others"].items())
            lines.append((result["part"], f"{row['what']}, {row['unit']}", number(row["ours"]), others, row["note"]))
        if result["fault"]:
            lines.append((result["part"], "", "", "", result["fault"]))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(part.ljust(width) for part, width in zip(line, [*widths, 0], strict=True)).rstrip() for line in lines
    )


def number(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# -- what the parts share ----------------------------------------------------------------------------------------------


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> Any:
    import torch

    return torch.bfloat16 if device() == "cuda" else torch.float32


def wait() -> None:
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    """Of a second call, when the device is done."""
    call()
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def reset_peak() -> None:
    import torch

    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Of tensors on a GPU, else of the process since it began."""
    import torch

    if device() == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def llama_config(size: Size, name: str, **changes: Any) -> Any:
    from transformers import LlamaConfig

    usual = {"max_position_embeddings": 4096, "tie_word_embeddings": name == "0.5b"}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
    return LlamaConfig(**size.llamas[name] | usual | ends | changes)


def llama(size: Size, name: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype())
    try:
        with torch.device(device()):
            return LlamaForCausalLM(llama_config(size, name)).eval()
    finally:
        torch.set_default_dtype(usual)


def token_prompts(size: Size, name: str) -> list[list[int]]:
    import numpy as np

    random = np.random.default_rng(0)
    return [random.integers(300, 4000, size.prompt_tokens).tolist() for _ in range(size.prompts[name])]


def save_model(size: Size, folder: Path, **changes: Any) -> Path:
    """A folder with the 0.5B model in float32 and the tokenizer of the bundled starter."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    from raftune.starters.text import policy_path

    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(llama_config(size, "0.5b", **changes))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy_path()).save_pretrained(folder)
    return folder


def texts(count: int) -> list[str]:
    return [f"Question {number}: what do people say about the number {number}?" for number in range(count)]


def many_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs from sample to sample."""
    return [sum(map(str.isalpha, text)) / (1 + len(text)) for text in completions]


def run_config(size: Size, root: Path, model: Path, **sections: Any) -> dict[str, Any]:
    prompts = root.parent / "prompts.jsonl"
    count = size.prompts["0.5b"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts(count + 4)))
    config: dict[str, Any] = {
        "output_dir": str(root),
        "num_rounds": 1,
        "prompts_per_round": count,
        "report": False,
        "data": {"prompts": str(prompts)},
        "policy": {"model": str(model), "dtype": str(dtype())[6:], "adapter": {"r": 16}},
        "sampling": {"num_generations": size.k, "max_completion_length": size.new_tokens, "chunk_size": count // 2},
        "training": {"learning_rate": 1e-4, "per_device_train_batch_size": 4},
        "evaluation": {"num_prompts": 4, "num_generations": 2},
        "guards": {"enabled": False},
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(config.get(name), dict) else values
    return config


def timed_round(config: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Seconds of a whole run, and those of each stage of its first round."""
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    stages: dict[str, float] = {}

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_end" and facts["round"] == 1:
            stages[facts["stage"]] = facts["seconds"]

    began = time.perf_counter()
    run(config, PythonObjects(rewards=[many_letters]), observe=observe)
    return time.perf_counter() - began, stages


# -- parts -------------------------------------------------------------------------------------------------------------


def generate_part(size: Size, rows: Rows, work: Path, name: str) -> None:
    """Tokens a second: ours and transformers' `generate`; and log-probabilities of what was generated."""
    import torch

    from raftune.policies.causal_lm.likelihood import TokenizedCompletion, log_probs
    from raftune.policies.causal_lm.sampling.backend import choose_backend, generate
    from raftune.policies.causal_lm.sampling.shared_prefix import prefix_log_probs
    from raftune.policies.causal_lm.sampling.token_choice import SamplingParams
    from raftune.policies.causal_lm.weight_probe import rows_of_prompts

    model, prompts = llama(size, name), token_prompts(size, name)
    count = len(prompts) * size.k
    settings = SamplingParams(max_completion_length=size.new_tokens, pad_id=PAD, batch_size=count)
    path, why = choose_backend(model, rows_of_prompts(prompts), settings).path(model, settings, size.prompt_tokens)
    seeds = [[i * size.k + k for k in range(size.k)] for i in range(len(prompts))]
    groups: list[Any] = []
    reset_peak()
    ours = (
        count
        * size.new_tokens
        / seconds_of(lambda: groups.__setitem__(slice(None), generate(model, None, prompts, seeds, settings, path)))
    )
    memory = peak_gb()
    row = Row(f"generation, {count} x {size.new_tokens} after {size.prompt_tokens}", "tok/s", ours)
    row.note = f"peak {memory:.1f} GB; {'shared prefix' if path == 'forked' else why}"
    rows.add(row)
    ids = torch.tensor([prompt for prompt in prompts for _ in range(size.k)], device=device())

    def theirs() -> None:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, eos_token_id=None,
            pad_token_id=PAD, min_new_tokens=size.new_tokens, max_new_tokens=size.new_tokens,
        )  # fmt: skip

    with torch.inference_mode():
        row.others["generate"] = count * size.new_tokens / seconds_of(theirs)
    rows.add(Row("ratio to generate", "x", ours / float(row.others["generate"])))

    pairs = zip(prompts, groups, strict=True)
    examples = [TokenizedCompletion.of(prompt, completion.ids) for prompt, group in pairs for completion in group]
    plain = count * size.new_tokens / seconds_of(lambda: log_probs(model, examples, 32, PAD))
    if path in ("fused", "forked"):
        shared = count * size.new_tokens / seconds_of(lambda: prefix_log_probs(model, examples, 32))
        rows.add(Row("log-probabilities of completions", "tok/s", shared, {"row by row": plain}))
    else:
        rows.add(Row("log-probabilities of completions", "tok/s", plain))


def vllm_part(size: Size, rows: Rows, work: Path, name: str) -> None:
    """The same generation by vLLM with weights of its own making, where it is installed in this environment."""
    if find_spec("vllm") is None:
        rows.add(Row("generation", "tok/s", note="vLLM is not installed here; --vllm-python names another environment"))
        return
    from vllm import LLM, SamplingParams

    shape = size.llamas[name]
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, "max_position_embeddings": 4096}
    config |= {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-6}
    config |= {"tie_word_embeddings": name == "0.5b", "hidden_act": "silu"}
    folder = work / "vllm-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    prompts = token_prompts(size, name)
    engine = LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
        max_model_len=size.prompt_tokens + size.new_tokens, gpu_memory_utilization=0.8, seed=0,
    )  # fmt: skip
    sampling = SamplingParams(
        n=size.k, max_tokens=size.new_tokens, ignore_eos=True, detokenize=False, logprobs=0, seed=0
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    taken = seconds_of(lambda: engine.generate(inputs, sampling, use_tqdm=False))
    count = len(prompts) * size.k
    what = f"generation, {count} x {size.new_tokens} after {size.prompt_tokens}"
    rows.add(Row(what, "tok/s", None, {"vllm": count * size.new_tokens / taken}))


class StepTimes:
    """Times of a Trainer's optimizer steps."""

    @staticmethod
    def callback() -> Any:
        from transformers import TrainerCallback

        class Times(TrainerCallback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.ends: list[float] = []

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                wait()
                self.ends.append(time.perf_counter())

        return Times()


def train_part(size: Size, rows: Rows, work: Path, method: str) -> None:
    """Tokens a second, prompts included, and peak memory, of all weights or LoRA: ours and TRL's SFTTrainer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raftune.config import validate
    from raftune.policies.causal_lm import CausalLM

    model = save_model(size, work / "model")
    steps, batch = size.steps + 1, 4
    lora = {"r": 16} if method == "lora" else None
    config = validate(
        run_config(size, work / "run", model)
        | {
            "policy": {"model": str(model), "adapter": lora},
            "training": {"learning_rate": 1e-5, "per_device_train_batch_size": batch, "max_steps": steps}
            | {"bf16": device() == "cuda"},
        }
    )
    start, out = work / "start", work / "out"
    CausalLM.start(config, start)
    policy = CausalLM.load(config, start, start)
    prompts = token_prompts(size, "0.5b") * (1 + size.train_rows // size.prompts["0.5b"])
    text = policy.tokenizer.decode(prompts[0])
    length = len(policy.tokenizer(text)["input_ids"])
    answers = [[300 + (row + token) % 3000 for token in range(size.new_tokens)] for row in range(size.train_rows)]
    data = [
        {"sample_id": f"s{row}", "prompt_id": f"p{row}", "prompt": text, "weight": 1.0, "origin": "round-0001"}
        | {"source": "policy", "completion": "", "completion_ids": answers[row], "finish": "length"}
        | {"completion_logprobs": [0.0] * size.new_tokens}
        for row in range(size.train_rows)
    ]
    lists = [("completion_ids", pa.list_(pa.int32())), ("completion_logprobs", pa.list_(pa.float32()))]
    names = ("sample_id", "prompt_id", "prompt", "origin", "source", "completion", "finish")
    schema = pa.schema([*((name, pa.string()) for name in names), ("weight", pa.float64()), *lists])
    schema = schema.with_metadata({"raftune.round": "1"})
    pq.write_table(pa.Table.from_pylist(data, schema=schema), work / "rows.parquet")
    for folder in (work / "fit", out):
        folder.mkdir()
    tokens = (steps - 1) * batch * (length + size.new_tokens)
    times = StepTimes.callback()
    reset_peak()
    policy.train(work / "rows.parquet", work / "fit", out, callbacks=[times])
    ours = tokens / (times.ends[-1] - times.ends[0])
    row = Row(f"training, {method}, rows of {length + size.new_tokens}, batch {batch}", "tok/s", ours)
    memory = Row(f"training, {method}, peak memory", "GB", peak_gb())
    rows.add(row)
    rows.add(memory)
    del policy
    if find_spec("trl") is None:
        row.note = "TRL is not installed here"
    else:
        sft(size, model, policy_tokens(text, model), answers, lora, steps, batch, row, memory, tokens, work)
    rows.path.write_text(json.dumps([asdict(row) for row in rows.rows]))


def policy_tokens(text: str, model: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return ids


def sft(
    size: Size, model: Path, prompt: list[int], answers: list[list[int]], lora: Any, steps: int, batch: int,
    row: Row, memory: Row, tokens: int, work: Path,
) -> None:  # fmt: skip
    """TRL's SFTTrainer on the same ids, in the same batches."""
    import gc

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    gc.collect()
    reset_peak()
    times = StepTimes.callback()
    mask = [0] * len(prompt) + [1] * size.new_tokens
    data = Dataset.from_list([{"input_ids": [*prompt, *ids], "completion_mask": mask} for ids in answers])
    args = SFTConfig(
        output_dir=str(work / "sft"), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-5,
        bf16=device() == "cuda", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, max_length=None, use_cpu=device() == "cpu", completion_only_loss=True,
    )  # fmt: skip
    adapter = (
        None if lora is None else LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=args, train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model), peft_config=adapter, callbacks=[times],
    )  # fmt: skip
    trainer.train()
    row.others["SFTTrainer"] = tokens / (times.ends[-1] - times.ends[0])
    memory.others["SFTTrainer"] = peak_gb()
    if device() == "cpu":
        memory.note = "of the process, in which ours ran first"


def images_part(size: Size, rows: Rows, work: Path) -> None:
    """Images a second: ours, PNG and latents included, and the pipeline called for each prompt."""
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from raftune.config import validate
    from raftune.policies.diffusion import Diffusion
    from raftune.protocols import Chunk
    from raftune.records import Prompt
    from raftune.starters.image import policy_path

    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype())
    tokenizer = CLIPTokenizer.from_pretrained(policy_path() / "tokenizer")
    tokenizer.model_max_length = 77
    encoders = []
    with torch.device(device()):
        for kind, shape in zip((CLIPTextModel, CLIPTextModelWithProjection), size.text, strict=True):
            config = CLIPTextConfig(
                vocab_size=len(tokenizer), num_hidden_layers=2, intermediate_size=2 * shape["hidden_size"],
                projection_dim=shape["hidden_size"], eos_token_id=tokenizer.eos_token_id, **shape,
            )  # fmt: skip
            encoders.append(kind(config))
        unet, vae = UNet2DConditionModel(**size.unet), AutoencoderKL(**size.vae)
    torch.set_default_dtype(usual)
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet, scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(work / "pipeline")
    captions = texts(size.images)
    options = {"num_inference_steps": size.denoising_steps, "guidance_scale": 5.0}
    pixels = {"height": size.pixels, "width": size.pixels}

    def theirs(pipe: Any) -> None:
        for number, caption in enumerate(captions):
            pipe(caption, generator=torch.Generator("cpu").manual_seed(number), **options, **pixels)

    reset_peak()
    what = f"images of {size.pixels} px, {size.denoising_steps} steps"
    row = Row(what, "images/s", None, {"pipeline": size.images / seconds_of(partial(theirs, pipe))})
    row.note = f"the pipeline's peak {peak_gb():.1f} GB"
    del pipe, unet, vae, encoders, config
    config = validate(
        {
            "num_rounds": 1,
            "data": {"prompts": "given here"},
            "policy": {"family": "diffusion", "model": str(work / "pipeline"), "dtype": str(dtype())[6:]}
            | {"adapter": {"r": 8}},
            "sampling": {"num_generations": 1, "batch_size": size.images, "diffusion": {**options, **pixels}},
        }
    )
    start = work / "start"
    began = time.perf_counter()
    Diffusion.start(config, start)
    rows.add(Row("loading the pipeline and checking it", "s", time.perf_counter() - began))
    policy = Diffusion.load(config, start, start)
    prompts = tuple(Prompt(str(number), caption) for number, caption in enumerate(captions))
    chunk = Chunk(1, "0001", "rollout", prompts, tuple((n,) for n in range(size.images)), size.images)
    reset_peak()
    row.ours = size.images / seconds_of(lambda: policy.generate(chunk))
    row.note += f", ours {peak_gb():.1f} GB"
    rows.add(row)


def round_part(size: Size, rows: Rows, work: Path, **policy: Any) -> None:
    """A whole round: LoRA on the 0.5B model, beta above 0, an evaluation before and after."""
    model = save_model(size, work / "model")
    reset_peak()
    config = run_config(size, work / "run", model, policy=policy, selection={"beta": 0.01})
    seconds, stages = timed_round(config)
    samples = size.prompts["0.5b"] * size.k
    shares = ", ".join(f"{name} {taken:.1f}" for name, taken in stages.items() if taken >= 0.1)
    rows.add(Row(f"a round of {samples} samples, start and evaluations included", "s", seconds, note=shares))
    rows.add(Row("peak memory of the round", "GB", peak_gb()))
    if "generate" in stages:
        rows.add(Row("samples a second, stage generate", "1/s", samples / stages["generate"]))


class Stopped(Exception):
    """The run is ended here, to be resumed."""


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of generated samples and of weights."""
    parts = {"samples": "round-0001/generate/*.parquet", "weights": "round-0001/model/*.safetensors"}
    found = {}
    for name, pattern in parts.items():
        digest = hashlib.sha256()
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
        found[name] = digest.hexdigest()[:16]
    return found


def resume_part(size: Size, rows: Rows, work: Path) -> None:
    """Whether a resumed round has the bytes of an uninterrupted one: by dtype, and with deterministic kernels."""
    import torch

    model = save_model(size, work / "model", num_hidden_layers=2)
    count = size.prompts["0.5b"] // 2
    small = {"num_generations": 4, "max_completion_length": min(32, size.new_tokens), "chunk_size": max(1, count // 2)}
    settings = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
    for number, (numbers, deterministic) in enumerate(settings):
        torch.use_deterministic_algorithms(deterministic)
        roots = {name: work / f"{number}-{name}" for name in ("whole", "again", "resumed")}

        def config(root: Path, numbers: str = numbers) -> dict[str, Any]:
            chosen = {"policy": {"dtype": numbers}, "sampling": small, "evaluation": {"num_prompts": 0}}
            return run_config(size, root, model, prompts_per_round=count, **chosen)

        for name in ("whole", "again"):
            timed_round(config(roots[name]))
        resumed(config(roots["resumed"]))
        found = {name: hashes(root) for name, root in roots.items()}
        whole = found["whole"]
        told = []
        for name in ("again", "resumed"):
            same = [what for what, value in found[name].items() if value == whole[what]]
            told.append(f"{name}: the same {' and '.join(same) or 'neither'}")
        label = f"{numbers}{', deterministic algorithms' if deterministic else ''}"
        torch.use_deterministic_algorithms(False)
        verdict = "equal" if found["resumed"] == whole else "differs"
        rows.add(Row(f"resumed against uninterrupted, {label}", "sha256", verdict, note="; ".join(told)))


def resumed(config: dict[str, Any]) -> None:
    """The run, ended after its first chunk and again when training begins."""
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    for kind, stage in (("chunk", "generate"), ("stage_end", "gather")):

        def observe(event: str, facts: dict[str, Any], kind: str = kind, stage: str = stage) -> None:
            if event == kind and facts.get("stage") == stage and facts["round"] == 1:
                raise Stopped

        with contextlib.suppress(Stopped):
            run(config, PythonObjects(rewards=[many_letters]), observe=observe)
    run(config, PythonObjects(rewards=[many_letters]))


# Each part, with its share of the time.
Part = Callable[[Size, Rows, Path], None]
PARTS: dict[str, tuple[float, Part]] = {
    "generate-0.5b": (0.12, lambda size, rows, work: generate_part(size, rows, work, "0.5b")),
    "generate-7b": (0.12, lambda size, rows, work: generate_part(size, rows, work, "7b")),
    "vllm-0.5b": (0.12, lambda size, rows, work: vllm_part(size, rows, work, "0.5b")),
    "vllm-7b": (0.12, lambda size, rows, work: vllm_part(size, rows, work, "7b")),
    "train-full": (0.1, lambda size, rows, work: train_part(size, rows, work, "full")),
    "train-lora": (0.1, lambda size, rows, work: train_part(size, rows, work, "lora")),
    "round": (0.12, round_part),
    "qlora": (0.1, lambda size, rows, work: round_part(size, rows, work, load_in_4bit=True)),
    "resume": (0.12, resume_part),
    "images": (0.15, images_part),
}


# -- processes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch(base: str | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="raftune-gpu-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(name: str, size: str, limit: float, base: str | None, python: str) -> dict[str, Any]:
    """A part in a process of its own, which is ended with all that it started when its time is up."""
    began = time.perf_counter()
    with scratch(base) as work:
        out, log = work / "rows.json", work / "log"
        command = [python, __file__, "--part", name, "--size", size, "--work", str(work)]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | None = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows = json.loads(out.read_text()) if out.is_file() else []
        fault = ""
        if code is None:
            fault = f"ended after {limit:.0f} s, its share of the time"
        elif code:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            fault = f"failed: {(lines or ['no output'])[-1][:200]}"
    return {"part": name, "rows": rows, "fault": fault, "seconds": time.perf_counter() - began}


def machine() -> dict[str, Any]:
    import torch
    import transformers

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.5, help="for all parts together")
    parser.add_argument("--size", choices=[*SIZES], default="full")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="write everything to this file, as JSON")
    parser.add_argument("--vllm-python", default=sys.executable, help="the Python of the environment that has vLLM")
    parser.add_argument("--scratch", help="a folder with 20 GB for models and runs; the system's by default")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        if args.part == "resume":  # read when CUDA starts
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        PARTS[args.part][1](SIZES[args.size], Rows(args.work / "rows.json"), args.work)
        return
    names = args.parts.split(",")
    if unknown := sorted({*names} - {*PARTS}):
        parser.error(f"--parts must be of {', '.join(PARTS)}; got {', '.join(unknown)}")
    facts = machine()
    if "gpu" not in facts and args.size == "full":
        parser.error("--size full needs a CUDA device, and torch sees none here; --size tiny runs on a CPU")
    until, results = time.perf_counter() + 60 * args.minutes, []
    for number, name in enumerate(names):
        later = sum(PARTS[other][0] for other in names[number:])
        remaining = until - time.perf_counter()
        limit = remaining * min(1.0, 2 * PARTS[name][0] / later)  # twice its share: most parts need less than theirs
        if limit < 1:
            results.append({"part": name, "rows": [], "fault": "there was no time left for it", "seconds": 0.0})
        else:
            print(f"{name} …", file=sys.stderr, flush=True)
            python = args.vllm_python if name.startswith("vllm") else sys.executable
            results.append(measure(name, args.size, limit, args.scratch, python))
        if args.out:
            args.out.write_text(json.dumps({"machine": facts, "size": args.size, "parts": results}, indent=1))
    print(
        ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
    )
    print(table(results))


if __name__ == "__main__":
    main()
