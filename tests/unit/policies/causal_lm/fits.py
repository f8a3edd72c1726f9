"""Fits of tiny models that several files of tests run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from raftune.policies.causal_lm import CausalLM
from tests.builders import EOS, Parts, save_tiny

TEXTS = ("the cab", "a hut", "beth", "that is", "so", "what then", "yes", "no, the bath")


def some_rows(count: int = 10) -> list[dict[str, Any]]:
    """Rows of different lengths; some prompts have two."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, size=count)
    ids = [[*random.integers(3, 200, n).tolist(), EOS] for n in lengths]
    return [{"prompt": TEXTS[i % len(TEXTS)], "completion_ids": row} for i, row in enumerate(ids)]


def model_folders(root: Path) -> dict[str, Path]:
    """A saved tiny model of each architecture."""
    return {arch: save_tiny(root / arch, arch) for arch in ("llama", "gpt2", "qwen2")}


def start_of(config: Parts, root: Path) -> Path:
    """The start folder of a run under `root`."""
    start = root / "round-0000" / "model"
    CausalLM.start(config, start)
    return start


def trained(config: Parts, root: Path, rows: Path, name: str = "round-0001", callbacks: Any = ()) -> tuple[Path, Any]:
    """The model folder after one round from the start, and the report."""
    start = root / "round-0000" / "model"
    if not start.exists():
        start_of(config, root)
    out = root / name / "model"
    report = CausalLM.load(config, start, start).train(rows, root / name / "train", out, callbacks)
    return out, report
