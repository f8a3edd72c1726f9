"""Tokens per second of raftune's generation, of batched `generate`, and of `generate` prompt by prompt, in one process.

A randomly initialised Llama (3.95M parameters, 8 query heads over 4 key/value heads) whose head is biased towards EOS,
so that lengths spread as in chat: geometric, 24 tokens on average, cut at 96. Or a chat model from a folder, on prompts
of its chat template. All ways generate K completions for the same prompts at temperature 1, in turn, several times;
medians are reported, by the clock and by CPU seconds, and for batched `generate` the best of several batch sizes. The
last figure is the share of the matrix-multiply rate that this machine reaches on the model's shapes. `--profile` tells
where raftune's time goes.

    python benchmarks/sampling.py                                                   # 512 samples, two threads
    python benchmarks/sampling.py --samples 2048 --batch-size 512                   # many short completions
    python benchmarks/sampling.py --prompt-lengths 250 250                          # long prompts
    python benchmarks/sampling.py --model FOLDER --samples 256 --max-length 32 --ways batched --repeats 1
    python benchmarks/sampling.py --samples 64 --max-length 32 --mean-length 8 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from raftune.policies.causal_lm.sampling.backend import choose_backend, generate
from raftune.policies.causal_lm.sampling.token_choice import BackendName, SamplingParams
from raftune.policies.causal_lm.weight_probe import rows_of_prompts

PAD, EOS, FIRST_WORD = 0, 2, 3
OURS, BATCHED, BY_PROMPT = "raftune", "generate, batch", "generate, prompt by prompt"
Draw = Callable[[], list[int]]  # the lengths of all completions, EOS included


class Measured(NamedTuple):
    """One call of a way: by the clock, in CPU seconds of all threads, and the tokens that it gave."""

    seconds: float
    cpu: float
    tokens: int


@dataclass(frozen=True)
class Task:
    """The task of every way."""

    model: Any
    prompts: list[list[int]]
    k: int
    max_length: int
    eos: int
    pad: int


def main() -> None:
    args = _arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.model:
        task = _chat_task(args)
    else:
        model = _model(args.vocabulary, args.hidden, args.layers, args.mean_length).to(args.device)
        prompts = _prompts(args.samples // args.k, args.prompt_lengths, args.vocabulary)
        task = Task(model, prompts, args.k, args.max_length, EOS, PAD)
    ways = _ways(task, args)
    if args.profile:
        _profile(ways)
    measured = _measure(ways, args.repeats, _synchronise(args.device), warm=not args.cold)
    found = _summary(task, measured, args)
    print(json.dumps(found, indent=1) if args.json else _table(found))


def _ways(task: Task, args: argparse.Namespace) -> dict[str, Draw]:
    settings = SamplingParams(
        max_completion_length=task.max_length, eos_ids=(task.eos,), pad_id=task.pad, batch_size=args.batch_size
    )
    backend = choose_backend(task.model, rows_of_prompts(task.prompts), settings)  # a run does it once, so: not timed
    path, reason = backend.path(task.model, settings, max(map(len, task.prompts)))
    if path != "fused":
        sys.exit(f"the shared-prefix cache was to be measured, but the model takes {path}: {reason}")
    ways: dict[str, Draw] = {OURS: lambda: _raftune(task, settings, path)}
    if "modules" in args.ways:
        ways["raftune, modules' forward"] = lambda: _raftune(task, settings, "forked")
    if "batched" in args.ways:
        for size in args.generate_batches:
            ways[f"{BATCHED} {size}"] = lambda size=size: _batched_generate(task, size)  # type: ignore[misc]
    if "prompts" in args.ways:
        ways[BY_PROMPT] = lambda: _prompt_by_prompt(task)
    return ways


def _profile(ways: dict[str, Draw]) -> None:
    """Prints the shares of operations in raftune's time, after an uncounted call."""
    ways[OURS]()
    with torch.profiler.profile() as profile:
        ways[OURS]()
    total = sum(event.self_cpu_time_total for event in profile.key_averages())
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    for event in events[:16]:
        print(f"  {event.self_cpu_time_total / total:5.1%}  {event.count:>7,} x  {event.key}", file=sys.stderr)


def _raftune(task: Task, settings: SamplingParams, path: BackendName) -> list[int]:
    seeds = np.arange(len(task.prompts) * task.k).reshape(len(task.prompts), task.k).tolist()
    sampled = generate(task.model, None, task.prompts, seeds, settings, path)
    return [len(sample.ids) for group in sampled for sample in group]


def _batched_generate(task: Task, size: int) -> list[int]:
    """Rows repeated K times, padded on the left, longest prompts first: the usual way."""
    rows = sorted((prompt for prompt in task.prompts for _ in range(task.k)), key=len, reverse=True)
    return [length for at in range(0, len(rows), size) for length in _generate(task, rows[at : at + size], 1)]


def _prompt_by_prompt(task: Task) -> list[int]:
    return [length for prompt in task.prompts for length in _generate(task, [prompt], task.k)]


def _generate(task: Task, rows: list[list[int]], returned: int) -> list[int]:
    width, device = max(map(len, rows)), task.model.device
    ids = torch.tensor([[task.pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.inference_mode():
        out = task.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=returned,
            max_new_tokens=task.max_length,
            eos_token_id=task.eos,
            pad_token_id=task.pad,
        )
    ended = (out[:, width:] == task.eos).cpu()
    found = ended.any(1)
    return torch.where(found, ended.int().argmax(1) + 1, ended.shape[1]).tolist()


def _measure(
    ways: dict[str, Draw], repeats: int, wait: Callable[[], None], warm: bool = True
) -> dict[str, list[Measured]]:
    """Each way and repeat, in turn; before them, `warm`, one uncounted call each."""
    for way in ways.values() if warm else ():
        way()
    measured: dict[str, list[Measured]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            wait()
            start, cpu = time.perf_counter(), time.process_time()
            lengths = way()
            wait()
            measured[name].append(Measured(time.perf_counter() - start, time.process_time() - cpu, sum(lengths)))
    return measured


def _summary(task: Task, measured: dict[str, list[Measured]], args: argparse.Namespace) -> dict[str, object]:
    rates = {name: statistics.median(run.tokens / run.seconds for run in runs) for name, runs in measured.items()}
    per_cpu = {name: statistics.median(run.tokens / run.cpu for run in runs) for name, runs in measured.items()}
    batched = [name for name in rates if name.startswith(BATCHED)]
    baselines = {"best batched generate": max(batched, key=rates.__getitem__)} if batched else {}
    baselines |= {name: name for name in (BY_PROMPT, "raftune, modules' forward") if name in rates}
    seconds = statistics.median(run.seconds for run in measured[OURS])
    tokens = measured[OURS][0].tokens  # the same in every repeat: the seeds are
    matmul = _matmul_rate(task.model, args.batch_size)
    flops = _model_flops(task, tokens)
    return {
        "machine": f"{args.threads} threads, {args.device}, torch {torch.__version__}",
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "samples": len(task.prompts) * task.k,
        "mean_length": tokens / (len(task.prompts) * task.k),
        "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
        "tokens_per_cpu_second": {name: round(rate) for name, rate in per_cpu.items()},
        "spread": {name: [round(run.tokens / run.seconds) for run in sorted(runs)] for name, runs in measured.items()},
        "ratios": {title: rates[OURS] / rates[name] for title, name in baselines.items()},
        "ratios_of_cpu_seconds": {title: per_cpu[OURS] / per_cpu[name] for title, name in baselines.items()},
        "matmul_gflops": matmul / 1e9,
        "draw_gflops": flops / seconds / 1e9,
        "share_of_matmul_rate": flops / seconds / matmul,
    }


def _table(found: dict[str, object]) -> str:
    rates, spread, per_cpu = found["tokens_per_second"], found["spread"], found["tokens_per_cpu_second"]
    ratios, of_cpu = found["ratios"], found["ratios_of_cpu_seconds"]
    assert isinstance(rates, dict) and isinstance(spread, dict) and isinstance(per_cpu, dict)
    assert isinstance(ratios, dict) and isinstance(of_cpu, dict)
    lines = [
        f"{found['machine']}; {found['parameters']:,} parameters",
        f"{found['samples']} samples, {found['mean_length']:.1f} tokens each on average",
    ]
    lines += [
        f"  {name:<28}{rate:>8,} tok/s ({spread[name][-1]:,} to {spread[name][0]:,}), {per_cpu[name]:,} per CPU second"
        for name, rate in rates.items()
    ]
    lines += [
        *(f"  raftune / {name:<28}{ratio:>6.1f}x; CPU {of_cpu[name]:.1f}x" for name, ratio in ratios.items()),
        f"  {found['draw_gflops']:.0f} of {found['matmul_gflops']:.0f} GFLOP/s in plain matrix products: "
        f"{found['share_of_matmul_rate']:.0%}",
    ]
    return "\n".join(lines)


def _model_flops(task: Task, tokens: int) -> float:
    """Floating-point operations that the completions need: linear layers, attention, and each prompt once.

    2 per weight and token for matrices (the input embedding is a lookup), 4 per query, key and channel for attention.
    """
    config = task.model.config
    head = config.hidden_size * config.vocab_size
    body = _matrix_weights(task.model) - head
    prompt_tokens = sum(map(len, task.prompts))
    samples = len(task.prompts) * task.k
    mean = tokens / samples
    attended = prompt_tokens / len(task.prompts) + (mean + 1) / 2
    decode = 2 * (body + head) * tokens + 4 * config.hidden_size * config.num_hidden_layers * attended * tokens
    prefill = 2 * body * prompt_tokens + 2 * head * len(task.prompts)
    prefill += 2 * config.hidden_size * config.num_hidden_layers * sum(len(prompt) ** 2 for prompt in task.prompts)
    return float(decode + prefill)


def _matrix_weights(model: Any) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def _matmul_rate(model: Any, rows: int, seconds: float = 1.0) -> float:
    """FLOP/s of one pass through all of the model's matrices with `rows` rows, nothing else done: the best of many."""
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        weight.shape[1]: torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
        for weight in weights
    }
    wait, best, stop = _synchronise(str(model.device)), float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < stop:
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            wait()
            best = min(best, time.perf_counter() - start)
    return 2 * rows * sum(weight.numel() for weight in weights) / best


def _synchronise(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def _chat_task(args: argparse.Namespace) -> Task:
    """A chat model from a folder, asked for a few sentences on one subject each."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    prompts = []
    for number in range(args.samples // args.k):
        messages = [{"role": "user", "content": f"Write {number + 2} sentences about the number {number}."}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return Task(model, prompts, args.k, args.max_length, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _model(vocabulary: int, hidden: int, layers: int, mean_length: float) -> LlamaForCausalLM:
    """Random weights; the head's bias gives EOS a chance of about 1/mean_length at every step."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(hidden, vocabulary)
    head.weight.data, head.bias.data = model.lm_head.weight.data, torch.zeros(vocabulary)
    head.bias.data[EOS] = np.log((vocabulary - 1) / (mean_length - 1))
    model.lm_head = head
    return model


def _prompts(count: int, lengths: tuple[int, int], vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(FIRST_WORD, vocabulary, size=rng.integers(lengths[0], lengths[1] + 1)).tolist()
        for _ in range(count)
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokens per second: raftune against transformers' generate.")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--k", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=(12, 60), metavar=("LEAST", "MOST"))
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a completion at most")
    parser.add_argument("--mean-length", type=float, default=24.4, help="of the geometric lengths, before the cut")
    parser.add_argument("--batch-size", type=int, default=256, help="rows alive at once, raftune")
    parser.add_argument(
        "--generate-batches", type=int, nargs="+", default=(64, 128, 256), help="rows of a generate call"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=("batched", "prompts"), choices=("modules", "batched", "prompts"))
    parser.add_argument("--cold", action="store_true", help="no uncounted first calls: for large models")
    parser.add_argument("--profile", action="store_true", help="print the operations that take raftune's time")
    parser.add_argument("--model", help="a folder with a chat model, instead of random weights")
    parser.add_argument("--dtype", default="float32", help="of the model in the folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
