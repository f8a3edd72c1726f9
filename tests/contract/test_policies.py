"""What every family of policies promises, whatever it generates: one suite, run over each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raftune.data.images import png_of
from raftune.testing import ALL, Claim, FamilyCase, begin, claims
from tests.builders import save_tiny
from tests.pipelines import SIZE, Kind
from tests.pipelines import save_tiny as save_pipeline


def tabular(folder: Path) -> FamilyCase:
    config = {
        "data": {"prompts": "-"},
        "policy": {"family": "tabular", "logits": [[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [0.3, 0.1, 0.2]]},
    }
    return begin(config, folder, prompts=[0, 1, 2], answer=1)


def causal_lm(folder: Path, arch: str, **policy: Any) -> FamilyCase:
    model = save_tiny(folder / arch, arch)
    config = {
        "data": {"prompts": "-"},
        "policy": {"model": str(model), **policy},
        "sampling": {"max_completion_length": 6},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4},
        "engine": {"threads": 1},
    }
    return begin(config, folder, prompts=["the cat", "a", "that is it"], answer="fine")


def diffusion(folder: Path, kind: Kind, prompts: list[Any], **policy: Any) -> FamilyCase:
    model = save_pipeline(kind, folder / kind)
    config = {
        "data": {"prompts": "-"},
        "policy": {"family": "diffusion", "model": str(model), "device": "cpu", **policy},
        "sampling": {"diffusion": {"num_inference_steps": 2, "guidance_scale": 1}},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4},
        "engine": {"threads": 1},
    }
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    picture = png_of(Image.fromarray(noise))
    return begin(config, folder, prompts=prompts, answer=picture)


CAPTIONS = ["a red circle", "a blue square on black", "the green circle"]
CASES: dict[str, Callable[[Path], FamilyCase]] = {
    "tabular": tabular,
    "llama": lambda folder: causal_lm(folder, "llama"),
    "gpt2 with LoRA": lambda folder: causal_lm(folder, "gpt2", adapter={"r": 2}),
    "qwen2": lambda folder: causal_lm(folder, "qwen2"),
    "stable diffusion": lambda folder: diffusion(folder, "sd", CAPTIONS),
    "stable diffusion 3 with LoRA": lambda folder: diffusion(folder, "sd3", CAPTIONS, adapter={"r": 2}),
    "class labels": lambda folder: diffusion(folder, "dit", [0, 3, 1]),
}


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyCase:
    return CASES[request.param](tmp_path_factory.mktemp("case"))


@pytest.mark.slow
@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim.__name__)
def test_a_family_keeps_its_promise(case: FamilyCase, claim: Claim, tmp_path: Path) -> None:
    if claim not in claims(case.family):
        pytest.skip("the family knows no likelihoods")
    claim(case, tmp_path)
