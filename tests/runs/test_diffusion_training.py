"""Whole tiny runs of a pipeline: reference images, replay, where each fit begins, and the model in other hands."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raftune.config import validate
from raftune.data.images import image_of, png_of
from raftune.errors import ConfigError, DataError
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion.images import latents_of
from raftune.results.export import export
from raftune.results.model_card import publish_model
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run, verify
from raftune.training.quiet import quiet
from tests.pipelines import SIZE, save_tiny, tiny_pipeline
from tests.runs import image_family
from tests.runs.test_diffusion_families import config, first_of, objects, pixels, plainly

pytestmark = pytest.mark.slow

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd-v", tmp_path_factory.mktemp("model") / "sd-v")


def discs(count: int, size: int = SIZE) -> list[bytes]:
    """Discs of another brightness each."""
    rows, columns = np.mgrid[:size, :size]
    inside = (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 3) ** 2
    return [
        png_of(Image.fromarray(np.where(inside[..., None], 40 + 20 * i, 10).astype(np.uint8).repeat(3, 2)))
        for i in range(count)
    ]


def reference(folder: Path, form: str, size: int = SIZE) -> Path:
    """A data set of six captioned images: their bytes in Parquet, or paths in JSONL."""
    images, captions = discs(6, size), [f"a disc of brightness {i}" for i in range(6)]
    if form == "bytes":
        pq.write_table(pa.table({"prompt": captions, "image": images}), folder / "reference.parquet")
        return folder / "reference.parquet"
    if form == "datasets":
        column = [{"bytes": image, "path": None} for image in images]
        pq.write_table(pa.table({"prompt": captions, "image": column}), folder / "reference.parquet")
        return folder / "reference.parquet"
    for i, image in enumerate(images):
        (folder / f"{i}.png").write_bytes(image)
    lines = [json.dumps({"prompt": caption, "image": str(folder / f"{i}.png")}) for i, caption in enumerate(captions)]
    (folder / "reference.jsonl").write_text("\n".join(lines))
    return folder / "reference.jsonl"


def training_on_references(path: Path, **more: Any) -> dict[str, Any]:
    return {"training": {"reference": {"path": str(path), "completion_column": "image", "fraction": 0.5}, **more}}


# -- reference and replay --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bytes", "datasets", "paths"])
def test_reference_images_are_mixed_in_as_latents_of_the_pipeline_s_own_encoder(
    model: Path, tmp_path: Path, form: str
) -> None:
    path, root = reference(tmp_path, form), tmp_path / "run"
    run(config(root, model, "sd-v", num_rounds=1, **training_on_references(path)), objects("sd-v"))
    rows = pq.read_table(root / "round-0001/rows/rows.parquet").to_pylist()
    assert Counter(row["origin"] for row in rows) == {"round-0001": 4, "reference": 4}
    known = discs(6)
    vae = tiny_pipeline("sd-v").vae
    for row in (row for row in rows if row["origin"] == "reference"):
        assert row["completion"] in known
        assert row["prompt"] == f"a disc of brightness {known.index(row['completion'])}"
        latents = latents_of(row["latents"], row["latents_shape"], row["latents_dtype"])
        decoded = vae.decode(latents[None] / vae.config.scaling_factor).sample
        assert decoded.shape == (1, 3, SIZE, SIZE)
    report = json.loads((root / "round-0001/model/training.json").read_text())
    assert report["rows"] == 8


def test_a_reference_image_of_another_size_is_named_with_both_sizes(model: Path, tmp_path: Path) -> None:
    path = reference(tmp_path, "bytes", size=24)
    with pytest.raises(DataError, match=r"size that the run generates, 16 x 16; the one for prompt .* is 24 x 24"):
        run(config(tmp_path / "run", model, "sd-v", num_rounds=1, **training_on_references(path)), objects("sd-v"))


def test_replayed_images_keep_the_latents_that_were_generated(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(config(root, model, "sd-v", training={"replay_rounds": 1}), objects("sd-v"))
    first, second = (pq.read_table(root / f"round-000{i}/rows/rows.parquet").to_pylist() for i in (1, 2))
    assert Counter(row["origin"] for row in second) == {"round-0001": 4, "round-0002": 4}
    replayed = {row["sample_id"]: row["latents"] for row in second if row["origin"] == "round-0001"}
    assert replayed == {row["sample_id"]: row["latents"] for row in first}


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["start", "previous"])
def test_a_round_s_fit_starts_from_the_model_that_is_named(model: Path, tmp_path: Path, begin: str) -> None:
    """The same rows fitted once more, from the start's folder or from round 1's, are round 2's weights bit for bit."""
    root = tmp_path / "run"
    given = config(root, model, "sd-v", training={"start_from": begin})
    run(given, objects("sd-v"))
    start, rows = root / "round-0000/model", root / "round-0002/rows/rows.parquet"
    weights = {"round 2": root / "round-0002/model" / WEIGHTS}
    for name, folder in (("start", start), ("previous", root / "round-0001/model")):
        out = tmp_path / name
        Diffusion.load(validate(given), folder, start).train(rows, tmp_path / f"{name}-work", out)
        weights[name] = out / WEIGHTS
    content = {name: path.read_bytes() for name, path in weights.items()}
    assert content["start"] != content["previous"]
    assert content["round 2"] == content[begin]


def test_moments_are_carried_and_older_models_released(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    carried = {"training": {"optimizer_state": "carried"}, "keep_models": "last"}
    run(config(root, model, "sd-v", **carried), objects("sd-v"))
    assert (root / "round-0002/model/optimizer.safetensors").is_file()
    assert not list((root / "round-0001/model").rglob("*.safetensors"))
    assert (root / "round-0002/model/unet/diffusion_pytorch_model.safetensors").is_file()
    assert verify(root) == []


# -- in other hands --------------------------------------------------------------------------------------------------


def loads_and_generates(pipe: Any, root: Path, model: Path) -> None:
    """The pipeline draws round 2's first image, which the start does not."""
    prompt, sample = first_of(root / "round-0002")
    ours = pixels(image_of(sample["completion"]))
    assert np.abs(ours - pixels(plainly(pipe, "sd-v", prompt, sample["seed"]))).max() <= 1
    with quiet():
        start = diffusers.DiffusionPipeline.from_pretrained(model)
    assert np.abs(ours - pixels(plainly(start, "sd-v", prompt, sample["seed"]))).max() >= 4


def snippet(card: Path) -> str:
    return card.read_text().split("```python\n")[1].split("```")[0]


def test_a_published_pipeline_loads_as_its_card_says(model: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "run", tmp_path / "out"
    run(config(root, model, "sd-v"), objects("sd-v"))
    publish_model(root, out, 1)
    card = (out / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "pipeline_tag: text-to-image" in card
    assert str(tmp_path) not in card
    assert f"(RAFT) of the model in the folder `{model.name}`" in card
    assert "height=16, width=16, num_inference_steps=2, guidance_scale=1.0" in card, "as the run generated"
    names: dict[str, Any] = {}
    exec(snippet(out / "README.md").replace("FOLDER", str(out)), names)
    assert names["image"].size == (SIZE, SIZE)
    loads_and_generates(names["pipe"], root, model)
    assert verify(root) == []


def test_a_published_lora_loads_as_its_card_says_onto_a_base_that_comes_along(model: Path, tmp_path: Path) -> None:
    """The start was given as an object, so that only the run has it; a whole pipeline that lay there goes."""
    root, out = tmp_path / "run", tmp_path / "out"
    given = objects("sd-v")
    with quiet():
        pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    given = PythonObjects(train=given.train, held_out=given.held_out, rewards=given.rewards, model=pipe)
    run(config(root, model, "sd-v", policy={"adapter": {"r": 2}, "model": "given as an object"}), given)
    publish_model(root, out, 0)
    assert (out / "unet").is_dir()
    publish_model(root, out, 1)
    written = ["README.md", "base", "pytorch_lora_weights.safetensors", "raftune_files.json"]
    assert sorted(path.name for path in out.iterdir()) == written
    names: dict[str, Any] = {}
    exec(snippet(out / "README.md").replace("FOLDER", str(out)), names)
    loads_and_generates(names["pipe"], root, model)


def test_a_lora_for_peft_says_so(tmp_path: Path) -> None:
    labels, root, out = save_tiny("dit", tmp_path / "dit"), tmp_path / "run", tmp_path / "out"
    run(config(root, labels, "dit", num_rounds=1), objects("dit"))
    publish_model(root, out, 1)
    code = snippet(out / "README.md")
    assert 'pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "FOLDER")' in code
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER", str(out)).replace("PATH/TO/dit", str(labels)), names)
    assert "default" in names["pipe"].transformer.peft_config
    assert names["image"].size == (SIZE, SIZE)


def test_a_lora_on_a_bundled_pipeline_takes_that_along(tmp_path: Path) -> None:
    """Whoever gets the LoRA need not have this package."""
    root, out = tmp_path / "run", tmp_path / "out"
    given = config(root, Path("starter"), "sd-v", num_rounds=1, policy={"adapter": {"r": 2}})
    run({**given, "evaluation": {"num_prompts": 0}, "training": {"max_steps": 1}}, objects("sd-v"))
    publish_model(root, out, 1)
    assert "(RAFT) of raftune's bundled `starter`" in (out / "README.md").read_text()
    names: dict[str, Any] = {}
    exec(snippet(out / "README.md").replace("FOLDER", str(out)), names)
    assert names["image"].size == (SIZE, SIZE)


# -- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_samples_are_taken_away_as_images_that_datasets_shows(tmp_path: Path, suffix: str) -> None:
    root, out = tmp_path / "run", tmp_path / f"pairs{suffix}"
    run(image_family.config(root, num_rounds=1), image_family.objects())
    assert export(root, "preference", out) > 0
    with quiet():
        table = datasets.Dataset.from_parquet(str(out)) if suffix else datasets.load_from_disk(str(out))
    row = table[0]
    scores = [image_family.saturation(prompts=[""], completions=[row[name]])[0] for name in ("chosen", "rejected")]
    assert scores[0] - scores[1] == pytest.approx(row["margin"])
    with pytest.raises(ConfigError, match=r"must end in \.parquet or be a folder for a run of images; got 'p.jsonl'"):
        export(root, "sft", tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="sft-tokens needs a family with tokens"):
        export(root, "sft-tokens", tmp_path / "tokens", allow_code=True)
    assert not (tmp_path / "p.jsonl").exists()
