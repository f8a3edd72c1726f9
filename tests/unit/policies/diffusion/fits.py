"""Fits of tiny denoisers that several files of tests run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raftune.config.policy import AdapterConfig, DiffusionPolicy
from raftune.config.sampling import DiffusionSampling, SamplingConfig
from raftune.config.training import DiffusionTraining, TrainingConfig
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion.images import FIELDS, columns_of
from raftune.protocols import Chunk
from raftune.records import INVALID, Prompt
from tests.pipelines import CELLS, SIZE

TEXTS = ("a red circle on white", "a blue square", "the green square on the left", "a circle")
SHAPE = {"ddpm": (3, SIZE, SIZE), "ddim": (3, SIZE, SIZE)}
UNGUIDED = ("dit", "pixart", "sd", "sd-v", "sdxl", "sd3", "flux")


@dataclass(frozen=True)
class Parts:
    """What of a run's configuration the diffusion family reads."""

    policy: DiffusionPolicy
    sampling: SamplingConfig
    training: TrainingConfig
    seed: int = 0
    num_rounds: int = 1


def parts(
    model: Path | str, kind: str = "sd", *, lora: bool | AdapterConfig = False, seed: int = 0, **changes: Any
) -> Parts:
    """Two steps of generating, no guidance, a high rate; `changes` are fields of training or training.diffusion, by
    name.
    """
    adapter = AdapterConfig(r=4, alpha=8.0) if lora is True else lora or None
    given = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 4, "save_steps": 1, **changes}
    denoising = {name: given.pop(name) for name in list(given) if name in DiffusionTraining.model_fields}
    policy = {name: given.pop(name) for name in list(given) if name in DiffusionPolicy.model_fields}
    guidance = {"guidance_scale": 1.0} if kind in UNGUIDED else {}
    size = {"height": SIZE, "width": SIZE} if kind in ("flux", "pixart") else {}  # which think of themselves as larger
    generated = DiffusionSampling(num_inference_steps=2, **size, **guidance)
    return Parts(
        DiffusionPolicy(**{"model": str(model), "device": "cpu", "adapter": adapter, **policy}),
        SamplingConfig(diffusion=generated),
        TrainingConfig(diffusion=DiffusionTraining(**denoising), **given),
        seed,
    )


def some_rows(kind: str = "sd", count: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random latents; some prompts have two."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPE.get(kind, (4, CELLS, CELLS))
    latents = torch.randn((count, *shape), generator=generator)
    prompts = [i % len(TEXTS) if kind in ("dit", "ddpm", "ddim") else TEXTS[i % len(TEXTS)] for i in range(count)]
    return [{"prompt": prompt, **columns_of(x0)} for prompt, x0 in zip(prompts, latents, strict=True)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], round_: int = 1) -> Path:
    """What the stage `gather` writes; `rows` need prompt and latents, and what differs from the usual."""
    prompts = [row["prompt"] for row in rows]
    full = [
        {"sample_id": f"s{i}", "prompt_id": f"p{prompts.index(row['prompt'])}", "weight": 1.0, **row}
        for i, row in enumerate(rows)
    ]
    kind = pa.int64() if isinstance(prompts[0], int) else pa.string()
    names = [("sample_id", pa.string()), ("prompt_id", pa.string()), ("prompt", kind), ("weight", pa.float64())]
    schema = pa.schema([*names, (INVALID, pa.string()), *FIELDS], metadata={"raftune.round": str(round_)})
    pq.write_table(pa.Table.from_pylist(full, schema=schema), path)
    return path


def start_of(config: Parts, root: Path) -> Path:
    """The start folder of a run under `root`."""
    start = root / "round-0000" / "model"
    if not start.exists():
        Diffusion.start(config, start)
    return start


def trained(config: Parts, root: Path, rows: Path, callbacks: Any = (), name: str = "round-0001") -> tuple[Path, Any]:
    """The model folder after one round from the start, and the report."""
    start, out = start_of(config, root), root / name / "model"
    report = Diffusion.load(config, start, start).train(rows, root / name / "train", out, callbacks)
    return out, report


def samples_of(config: Parts, folder: Path, start: Path, prompts: Sequence[Any] = TEXTS[:2], k: int = 1) -> list[Any]:
    """What the policy of this folder draws for the prompts, seeds 0, 1, …"""
    asked = tuple(Prompt(f"p{i}", content) for i, content in enumerate(prompts))
    seeds = tuple(tuple(range(i * k, i * k + k)) for i in range(len(prompts)))
    return Diffusion.load(config, folder, start).generate(Chunk(0, "round-0001", "round-0000", asked, seeds, 4))
