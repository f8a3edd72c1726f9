"""Whole tiny runs of every architecture: two rounds, and every image on record is one that diffusers draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from PIL import Image

from raftune.data.images import image_of
from raftune.errors import ConfigError, DataError, ModelError
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.training.quiet import quiet
from tests.builders import Killed
from tests.pipelines import SIZE, WORDS, Kind, save_tiny
from tests.runs.test_causal_lm_runs import dying_after, tree

pytestmark = pytest.mark.slow

UNCONDITIONAL = ("ddpm", "ddim")
LORA = ("sd", "sdxl", "sd3", "flux", "dit", "ddim")  # the others are trained whole
CAPTIONS = [f"a {word} circle" for word in WORDS[:8]]


def redness(prompts: list[Any], completions: list[Image.Image], **columns: Any) -> list[float]:
    return [float(pixels(image)[..., 0].mean() - pixels(image)[..., 2].mean()) for image in completions]


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def objects(kind: Kind, prompts: list[Any] | None = None) -> PythonObjects:
    asked = pa.table({"prompt": prompts or (list(range(8)) if kind == "dit" else CAPTIONS)})
    return PythonObjects(train=lambda: asked, held_out=lambda: asked.slice(0, 2), rewards=[redness])


def config(root: Path, model: Path, kind: Kind, **sections: Any) -> dict[str, Any]:
    """Four prompts with two images each in two steps; every architecture under the options that it has."""
    generated: dict[str, Any] = {"num_inference_steps": 2}
    generated |= {} if kind in UNCONDITIONAL else {"guidance_scale": 1.0}
    generated |= {} if kind in ("dit", *UNCONDITIONAL) else {"height": SIZE, "width": SIZE}
    base: dict[str, Any] = {
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 4,
        "data": {"prompts": "given as an object"},
        "policy": {"family": "diffusion", "model": str(model), "device": "cpu"},
        "sampling": {"num_generations": 2, "chunk_size": 4, "diffusion": generated},
        "training": {"learning_rate": 0.03, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1},
        "evaluation": {"num_prompts": 2, "num_generations": 1},
        "engine": {"threads": 1},
        "report": False,
    }
    if kind in LORA:
        base["policy"]["adapter"] = {"r": 2}
    for name, values in sections.items():
        base[name] = {**base[name], **values} if isinstance(base.get(name), dict) else values
    return base


def plainly(pipe: Any, kind: Kind, prompt: Any, seed: int) -> Image.Image:
    """What the pipeline samples by itself for this prompt and seed."""
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": 2, "generator": [torch.Generator("cpu").manual_seed(seed)]}
    if kind == "dit":
        given |= {"class_labels": [prompt], "guidance_scale": 1.0}
    elif kind not in UNCONDITIONAL:
        given |= {"prompt": prompt, "height": SIZE, "width": SIZE, "guidance_scale": 1.0}
    if kind == "pixart":
        given["use_resolution_binning"] = False
    with quiet():
        found: Image.Image = pipe(**given).images[0]
    return found


def pipeline_of(model: Path, round_: Path) -> Any:
    """The pipeline with a round's weights, read as its users read them; of a LoRA, onto the start."""
    with quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(model)
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        denoiser = getattr(pipe, name)
        if (round_ / name).is_dir():
            setattr(pipe, name, type(denoiser).from_pretrained(round_ / name))
        elif (round_ / "pytorch_lora_weights.safetensors").is_file():
            pipe.load_lora_weights(round_)
        else:
            setattr(pipe, name, PeftModel.from_pretrained(denoiser, round_).merge_and_unload())
    return pipe


def first_of(round_: Path) -> tuple[Any, dict[str, Any]]:
    """The first image of a round's ledger, with what was asked."""
    sample = pq.read_table(round_ / "generate" / "chunk-00000.parquet").slice(0, 1).to_pylist()[0]
    asked = {row["prompt_id"]: row["prompt"] for row in pq.read_table(round_ / "plan" / "prompts.parquet").to_pylist()}
    return asked[sample["prompt_id"]], sample


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl", "sd3", "flux", "pixart", "dit", "ddpm", "ddim"])
def test_a_run_aligns_every_architecture_and_its_ledger_is_reproducible(tmp_path: Path, kind: Kind) -> None:
    model, root = save_tiny(kind, tmp_path / "model"), tmp_path / "run"
    run(config(root, model, kind), objects(kind))
    with quiet():
        start = diffusers.DiffusionPipeline.from_pretrained(model)
    tuned = pipeline_of(model, root / "round-0001" / "model")
    prompt, sample = first_of(root / "round-0001")
    before = image_of(sample["completion"])
    assert np.abs(pixels(before) - pixels(plainly(start, kind, prompt, sample["seed"]))).max() <= 1
    prompt, sample = first_of(root / "round-0002")
    after = image_of(sample["completion"])
    assert np.abs(pixels(after) - pixels(plainly(tuned, kind, prompt, sample["seed"]))).max() <= 1
    assert np.abs(pixels(after) - pixels(plainly(start, kind, prompt, sample["seed"]))).max() >= 4


def test_what_is_kept_is_the_reddest_of_each_prompt_with_its_latents(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(config(root, save_tiny("flux", tmp_path / "model"), "flux", num_rounds=1), objects("flux"))
    generated = pq.read_table(root / "round-0001" / "generate" / "chunk-00000.parquet").to_pylist()
    red = {row["sample_id"]: redness([], [image_of(row["completion"])])[0] for row in generated}
    groups: dict[str, list[str]] = {}
    for row in generated:
        groups.setdefault(row["prompt_id"], []).append(row["sample_id"])
    kept = pq.read_table(root / "round-0001" / "rows" / "rows.parquet").to_pylist()
    assert {row["sample_id"] for row in kept} == {max(group, key=red.__getitem__) for group in groups.values()}
    assert {tuple(row["latents_shape"]) for row in kept} == {(4, 8, 8)}  # unpacked, whatever travels in packs
    judged = pq.read_table(root / "round-0001" / "evaluate" / "generate" / "chunk-00000.parquet")
    assert judged.num_rows == 2 and judged.column("latents").null_count == 2


@pytest.mark.parametrize("kind", ["flux", "dit", "ddpm"])
def test_a_run_cut_short_ends_with_the_same_bytes(tmp_path: Path, kind: Kind) -> None:
    model, seen = save_tiny(kind, tmp_path / "model"), []  # type: ignore[var-annotated]
    run(config(tmp_path / "whole", model, kind, num_rounds=1), objects(kind), observe=lambda *each: seen.append(each))
    for _ in range(2):  # the second run goes on from where the first was cut
        with pytest.raises(Killed):
            run(
                config(tmp_path / "cut", model, kind, num_rounds=1),
                objects(kind),
                observe=dying_after(len(seen) // 3),
            )
    run(config(tmp_path / "cut", model, kind, num_rounds=1), objects(kind))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


# -- bad input ---------------------------------------------------------------------------------------------------------


def of_another_class(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))


def without_tokens(model: Path) -> None:
    shutil.rmtree(model / "tokenizer_2")


# Kind, prompts, what lies under which dotted name, error and words.
BAD: list[tuple[Kind, list[Any] | None, dict[str, Any], type[Exception], str]] = [
    ("dit", [1, 2, 3, 1000], {}, DataError, r"class labels, whole numbers from 0 to 999; got 1000"),
    ("dit", ["1", "2", "3", "4"], {}, DataError, r"got '\d'\. Write \d as a number, without quotes"),
    ("sd3", [1, 2, 3, 4], {}, DataError, r"StableDiffusion3Pipeline must be texts; got \d"),
    (
        "sd3",
        None,
        {"policy.pipeline_init_kwargs.text_encoder_2": None},
        ModelError,
        r"no text_encoder_2\. Load it whole",
    ),
    ("flux", None, {"sampling.diffusion.height": 18}, ConfigError, r"multiple of 4 .*got 18\. Write 16 or 20"),
    (
        "ddpm",
        None,
        {"sampling.diffusion.height": 32},
        ConfigError,
        r"must be 16 x 16, at which alone this DDPMPipeline",
    ),
    ("dit", None, {"sampling.diffusion.negative_prompt": "ugly"}, ConfigError, r"means nothing to a DiTPipeline"),
]


@pytest.mark.parametrize(("kind", "prompts", "changes", "error", "why"), BAD)
def test_what_cannot_be_generated_is_refused_in_words(
    tmp_path: Path, kind: Kind, prompts: list[Any] | None, changes: dict[str, Any], error: type[Exception], why: str
) -> None:
    given = config(tmp_path / "run", save_tiny(kind, tmp_path / "model"), kind)
    for name, value in changes.items():
        *sections, field = name.split(".")
        section = given
        for one in sections:
            section = section.setdefault(one, {})
        section[field] = value
    with pytest.raises(error, match=why):
        run(given, objects(kind, prompts))


@pytest.mark.parametrize(
    ("kind", "damage", "why"),
    [
        ("pixart", of_another_class, r"got a KandinskyPipeline\. Supported are .*PixArtSigmaPipeline"),
        ("flux", without_tokens, r"lacks the folder tokenizer_2/ \(T5Tokenizer"),
    ],
)
def test_a_folder_that_is_no_whole_pipeline_is_refused(
    tmp_path: Path, kind: Kind, damage: Callable[[Path], None], why: str
) -> None:
    model = save_tiny(kind, tmp_path / "model")
    damage(model)
    with pytest.raises(ModelError, match=why):
        run(config(tmp_path / "run", model, kind), objects(kind))
