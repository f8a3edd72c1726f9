"""Images per second of raftune's generation, and of the pipeline called image by image and prompt by prompt.

A pipeline of the image starter's architecture (32 px) with random weights: its time does not depend on them. All ways
generate the same images in one process, K for each prompt, with the same seeds, in turn, several times; medians are
reported. Ours ends in PNG bytes and latents, as runs store them; the others end in PIL images. Its time is split into
shares: the denoiser's forwards, the decoder, and the rest (scheduler, PNG, Python). Ours runs one batch on each core.

    python benchmarks/image_sampling.py                   # 16 prompts x 8, 12 steps, guidance 1, two threads
    python benchmarks/image_sampling.py --pipeline flow --prompts 4 --repeats 1
    python benchmarks/image_sampling.py --batch-sizes 16 32 64 128
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from raftune.config import RunConfig, validate
from raftune.policies.diffusion import Diffusion
from raftune.protocols import Chunk
from raftune.records import Prompt, derive_seed
from raftune.training.quiet import quiet


@dataclass(frozen=True)
class Task:
    """What every way generates."""

    config: RunConfig
    start: Path
    captions: list[str]
    seeds: list[list[int]]

    @property
    def images(self) -> int:
        return sum(map(len, self.seeds))

    @property
    def call(self) -> dict[str, Any]:
        diffusion = self.config.sampling.diffusion
        return {
            "num_inference_steps": diffusion.num_inference_steps,
            "guidance_scale": diffusion.guidance_scale,
            **diffusion.pipeline_kwargs,
        }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        task = task_of(args, Path(folder))
        ways: dict[str, Callable[[], object]] = {
            "pipeline, image by image": lambda: image_by_image(task),
            "pipeline, prompt by prompt": lambda: prompt_by_prompt(task),
            **{f"raftune, batches of {size}": (lambda size=size: ours(task, size)) for size in args.batch_sizes},
        }
        seconds = medians(ways, args.repeats)
        rates = {name: task.images / taken for name, taken in seconds.items()}
        report(rates, shares(task, args.batch_sizes[0]), args)


def task_of(args: argparse.Namespace, folder: Path) -> Task:
    """The pipeline on disk, and a policy's start that refers to it."""
    from diffusers import AutoencoderKL

    sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/ is no part of the package
    from raftune.starters.image.images import scenes
    from tools.starters.image.train_policies import untrained_flow, untrained_unet

    torch.manual_seed(0)
    weights = Path(__file__).parents[1] / "raftune/starters/image/weights/policy/vae"
    with quiet():
        vae = AutoencoderKL.from_pretrained(weights)
        pipe = {"sd": untrained_unet, "flow": untrained_flow}[args.pipeline](vae)
        pipe.save_pretrained(folder / "pipeline")
    start = folder / "round-0000" / "model"
    start.mkdir(parents=True)
    reading = {"max_sequence_length": 1} if args.pipeline == "flow" else {}
    diffusion = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "pipeline_kwargs": reading}
    config = validate(
        {
            "data": {"prompts": "-"},
            "policy": {"family": "diffusion", "model": str(folder / "pipeline"), "device": "cpu"},
            "sampling": {"diffusion": diffusion},
            "engine": {"threads": args.threads},
        }
    )
    Diffusion.start(config, start)
    captions = [scene.caption for scene in scenes("train")[: args.prompts]]
    seeds = [[derive_seed("benchmark", i, k) for k in range(args.k)] for i in range(args.prompts)]
    return Task(config, start, captions, seeds)


# -- the ways ----------------------------------------------------------------------------------------------------------


def ours(task: Task, batch_size: int) -> object:
    """A fresh policy, as in a round: its denoiser is read, its prompts are encoded, its images end as PNG."""
    policy = Diffusion.load(task.config, task.start, task.start)
    prompts = tuple(Prompt(str(i), caption) for i, caption in enumerate(task.captions))
    seeds = tuple(tuple(row) for row in task.seeds)
    return policy.generate(Chunk(0, "0001", "round-0000", prompts, seeds, batch_size))


def image_by_image(task: Task) -> object:
    pipe = plain(task)
    return [
        pipe(caption, generator=torch.Generator().manual_seed(seed), **task.call).images[0]
        for caption, row in zip(task.captions, task.seeds, strict=True)
        for seed in row
    ]


def prompt_by_prompt(task: Task) -> object:
    pipe = plain(task)
    return [
        pipe(
            caption,
            generator=[torch.Generator().manual_seed(seed) for seed in row],
            num_images_per_prompt=len(row),
            **task.call,
        ).images
        for caption, row in zip(task.captions, task.seeds, strict=True)
    ]


def plain(task: Task) -> Any:
    """The pipeline as anybody loads it."""
    from diffusers import DiffusionPipeline

    with quiet():
        pipe = DiffusionPipeline.from_pretrained(task.config.policy.model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- the clock ---------------------------------------------------------------------------------------------------------


def medians(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turn after one round that only warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def shares(task: Task, batch_size: int) -> dict[str, float]:
    """The share of our generate's time that the denoiser and the decoder take, on one core, a batch at a time."""
    torch.set_num_threads(1)
    policy = Diffusion.load(task.config, task.start, task.start)
    spent: dict[str, float] = {}
    pipe = policy.sampler.pipe
    with timed(policy.sampler.denoiser, "forward", "denoiser", spent), timed(pipe.vae, "decode", "decoder", spent):
        started = time.perf_counter()
        prompts = tuple(Prompt(str(i), caption) for i, caption in enumerate(task.captions))
        policy.generate(Chunk(0, "0001", "round-0000", prompts, tuple(map(tuple, task.seeds)), batch_size))
        whole = time.perf_counter() - started
    found = {name: seconds / whole for name, seconds in spent.items()}
    return {**found, "the rest": 1 - sum(found.values())}


@contextmanager
def timed(module: Any, method: str, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Within, the seconds spent in this method are added up under a name."""
    inner = getattr(module, method)

    def measured(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    setattr(module, method, measured)
    try:
        yield
    finally:
        delattr(module, method)


def report(rates: dict[str, float], bound: dict[str, float], args: argparse.Namespace) -> None:
    if args.json:
        sys.stdout.write(json.dumps({"images_per_second": rates, "shares": bound, **vars(args)}) + "\n")
        return
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        sys.stdout.write(f"{name:28} {rate:8.1f} images/s   {rate / first:5.2f}x\n")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in bound.items())
    sys.stdout.write(f"of ours, in batches of {args.batch_sizes[0]} on one core: {shares}\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pipeline", choices=("sd", "flow"), default="sd")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=8, help="images for each prompt")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
