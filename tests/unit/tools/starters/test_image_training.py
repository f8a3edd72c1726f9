"""What builds the image starter: each part on a few steps, and the gate before the denoisers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from raftune.starters import image
from raftune.starters.image.images import ANY_RADIUS, SCENES, SHAPES, paint, scenes
from tools.starters.image import build
from tools.starters.image.autoencoder import AutoencoderRecipe, centre, encode, reconstruct, train_autoencoder
from tools.starters.image.captions import LENGTH, SPOILED, tokenizer, words
from tools.starters.image.saving import load_head, save_head, save_part
from tools.starters.image.train_judges import JudgeRecipe, contrast, gallery, groups
from tools.starters.image.train_policies import (
    LEVELS,
    ImagePolicyRecipe,
    TrainingLeg,
    lessons,
    levels,
    train_flow,
    train_unet,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(image.policy_path() / "vae").eval()


def test_an_autoencoder_in_which_the_judge_cannot_see_ends_the_build(tmp_path: Path) -> None:
    save_part(train_autoencoder(AutoencoderRecipe(steps=1, channels=(8, 8, 8)), 0), tmp_path / "policy" / "vae")
    with pytest.raises(SystemExit, match=r"each attribute right in 98%; got .*colour.* train the autoencoder for more"):
        build.build_judge(tmp_path, 0, JudgeRecipe(steps=1, copies=2))


def test_centred_latents_have_mean_0_and_deviation_1_and_the_images_stay_the_same() -> None:
    vae = train_autoencoder(AutoencoderRecipe(steps=1, channels=(8, 8, 8)), 0)
    with torch.no_grad():  # away from the centre again
        vae.quant_conv.bias[:4] += torch.tensor([1.0, -2.0, 0.5, 3.0])
    pixels = paint(SCENES[::8], np.random.default_rng(0), ANY_RADIUS)
    before = reconstruct(vae, pixels)
    centre(vae, 5, images=768)
    latents = encode(vae, paint(SCENES, np.random.default_rng(1), ANY_RADIUS))
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.15
    assert np.abs(reconstruct(vae, pixels) - before).max() < 1e-4


def test_the_shipped_latents_are_centred_and_any_pipeline_takes_them_as_they_are(vae: AutoencoderKL) -> None:
    latents = encode(vae, paint(SCENES, np.random.default_rng(1), ANY_RADIUS))
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.0, 0.0)


def test_three_captions_in_ten_are_another_scenes_and_none_is_held_out(vae: AutoencoderKL) -> None:
    recipe = ImagePolicyRecipe((), pictures=960)
    known, right = lessons(vae, recipe, 0), lessons(vae, recipe._replace(wrong=0.0), 0)
    assert known.latents.shape == (960, 4, 8, 8)
    # 960 draws of probability 0.3: five standard deviations are 0.074.
    assert abs(np.mean([a != b for a, b in zip(known.captions, right.captions, strict=True)]) - 0.3) < 0.074
    assert set(known.captions) <= {scene.caption for scene in scenes("train")}
    _, told = known.some(np.random.default_rng(0), 2000, dropout=0.1)
    assert abs(np.mean([caption == "" for caption in told]) - 0.1) < 0.034


@pytest.mark.parametrize("train", [train_unet, train_flow])
def test_two_trainings_with_one_seed_are_the_same_and_the_autoencoder_stays_as_it_was(
    train: object, vae: AutoencoderKL
) -> None:
    frozen = {name: value.clone() for name, value in vae.state_dict().items()}
    recipe = ImagePolicyRecipe((TrainingLeg(1, 1e-3), TrainingLeg(1, 1e-3, noisy=True)), pictures=48, batch=4)
    pipes = [train(vae, recipe, 3) for _ in range(2)]  # type: ignore[operator]
    first, second = (pipe.components["unet" if "unet" in pipe.components else "transformer"] for pipe in pipes)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(frozen[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(("noisy", "share"), [(False, 0.4), (True, 0.7)])
def test_a_noisy_leg_has_half_of_its_noise_levels_among_the_highest(noisy: bool, share: float) -> None:
    t = levels(4000, torch.Generator().manual_seed(0), noisy=noisy)
    assert t.shape == (4000,)
    assert 0 <= t.min() < 0.01 * LEVELS
    assert t.max() < LEVELS
    assert abs((t >= 0.6 * LEVELS).float().mean() - share) < 0.04  # five standard deviations


def test_a_gallery_holds_every_scene_and_groups_differ_in_their_shape_alone(vae: AutoencoderKL) -> None:
    shown = gallery(vae, 1, 0)
    assert shown.scenes == list(SCENES)
    for group in groups(np.random.default_rng(0), 6, 1).reshape(-1, len(SHAPES)):
        found = [shown.scenes[i] for i in group]
        assert [scene.shape for scene in found] == list(SHAPES)
        assert len({scene._replace(shape="") for scene in found}) == 1


def test_images_with_equal_captions_share_the_target() -> None:
    captions = ["a", "b", "a"]
    same = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert contrast(100 * same, captions).item() == pytest.approx(2 / 3 * np.log(2), abs=1e-6)
    assert contrast(100 * torch.eye(3), captions) > 10


def test_every_word_of_a_caption_is_one_token_and_another_word_stays_in_pieces() -> None:
    known = tokenizer()
    for word in words():
        assert len(known.tokenize(word)) == 1, word
    assert len(known.tokenize("turquoise")) > 1
    assert known.unk_token_id not in known("Ünknown, 42!")["input_ids"][1:-1]
    assert max(len(known(SPOILED + scene.caption)["input_ids"]) for scene in SCENES) <= LENGTH


def test_a_head_is_read_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    save_head(head, tmp_path, clip="../reward")
    x = torch.randn(5, 4)
    assert torch.equal(load_head(tmp_path)(x), head(x))
