"""The shipped weights: plain diffusers and transformers load them, they generate, they rank, and they are small."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import AutoTokenizer, CLIPModel

from raftune.rewards.builtin.aesthetic import AestheticReward
from raftune.rewards.builtin.clip_score import ClipScoreReward
from raftune.starters import image
from raftune.starters.image.images import ANY_RADIUS, ATTRIBUTES, SCENES, as_image, paint
from raftune.starters.image.judge import all_right
from tools.starters.image.captions import LENGTH
from tools.starters.image.corruptions import spoiled

WEIGHTS = image.policy_path().parent
CLASSES = {"policy": StableDiffusionPipeline, "flow": StableDiffusion3Pipeline}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shown() -> tuple[list[Any], list[Any]]:
    """128 scenes and their pictures."""
    rng = np.random.default_rng(11)
    chosen = [SCENES[i] for i in rng.integers(len(SCENES), size=128)]
    return chosen, list(map(as_image, paint(chosen, rng, ANY_RADIUS)))


def test_all_of_it_is_under_ten_mebibytes() -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) < 10 * 2**20


def test_no_file_names_a_place_on_the_machine_that_built_it() -> None:
    for path in WEIGHTS.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.mark.parametrize("name", CLASSES)
def test_plain_diffusers_loads_finite_float32_weights_and_samples_what_the_seed_says(name: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(WEIGHTS / name)
    assert type(pipe) is CLASSES[name]
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in part.parameters())
    pipe.set_progress_bar_config(disable=True)
    first, second = (
        pipe(SCENES[0].caption, num_inference_steps=2, generator=torch.Generator().manual_seed(1)).images[0]
        for _ in range(2)
    )
    assert first.size == (32, 32)
    assert first.tobytes() == second.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("policy", {}), ("flow", {"max_sequence_length": LENGTH})])
def test_a_policy_errs_and_leaves_headroom_that_eight_samples_can_find(name: str, options: dict[str, Any]) -> None:
    pipe = DiffusionPipeline.from_pretrained(WEIGHTS / name)
    pipe.set_progress_bar_config(disable=True)
    captions = [caption for caption in image.prompts("heldout", 8, 5) for _ in range(8)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    generated = pipe(captions, num_inference_steps=12, guidance_scale=1.0, generator=seeds, **options).images
    right_NK = np.array(all_right(captions, generated), dtype=float).reshape(8, 8)
    assert 0.05 < right_NK.mean() < 0.6
    assert right_NK.max(1).mean() > 0.5


def test_clip_ranks_an_images_own_caption_above_one_with_a_wrong_word(shown: tuple[list[Any], list[Any]]) -> None:
    score = ClipScoreReward(model=str(image.reward_path())).load(device="cpu")
    scenes, pictures = shown
    own = np.array(score(prompts=[scene.caption for scene in scenes], completions=pictures))
    for name, words in ATTRIBUTES.items():
        moved = [words[(words.index(getattr(scene, name)) + 1) % len(words)] for scene in scenes]
        others = [scene._replace(**{name: word}).caption for scene, word in zip(scenes, moved, strict=True)]
        assert (own > np.array(score(prompts=others, completions=pictures))).mean() >= 0.9, name


def test_clip_reads_a_whole_caption_and_knows_its_own_end() -> None:
    tokenizer = AutoTokenizer.from_pretrained(image.reward_path())
    config = CLIPModel.from_pretrained(image.reward_path()).config.text_config
    assert config.eos_token_id == tokenizer.eos_token_id != 2
    for scene in SCENES:
        ids = tokenizer(scene.caption)["input_ids"]
        assert len(ids) == 13 <= tokenizer.model_max_length
        assert tokenizer.decode(ids, skip_special_tokens=True) == scene.caption


def test_the_aesthetic_head_likes_clean_images_better_than_spoiled_ones(shown: tuple[list[Any], list[Any]]) -> None:
    head = AestheticReward(model=str(image.aesthetic_path())).load(device="cpu")
    scenes, pictures = shown
    worse = list(map(as_image, spoiled(scenes, np.random.default_rng(3), ANY_RADIUS)))
    found = np.array(head(prompts=[""] * 256, completions=[*pictures, *worse]), dtype=float).reshape(2, 128)
    assert (found[0] > found[1]).mean() >= 0.9


def test_the_manifest_states_what_was_measured_and_the_sizes_on_disk() -> None:
    manifest = json.loads((WEIGHTS / "manifest.json").read_text())
    seen = manifest["judge"]["measured"]["right_on_reconstructions"]
    assert min(seen[name] for name in ATTRIBUTES) >= 0.98
    assert manifest["aesthetic"]["measured"]["good_above_spoiled"] >= 0.95
    for name in ("judge", "reward", "aesthetic", "policy", "flow"):
        assert manifest[name]["bytes"] == sum(f.stat().st_size for f in (WEIGHTS / name).rglob("*") if f.is_file())
