"""The pictures' generator: what a caption says is what is painted, and the splits keep captions apart."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from raftune.starters.image import judge, prompts
from raftune.starters.image.images import (
    ANY_RADIUS,
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SCENES,
    SIZE,
    USUAL_RADIUS,
    ImageSplit,
    Scene,
    as_image,
    paint,
    scene_of,
    scenes,
)
from raftune.starters.image.judge import all_right, compared
from tools.starters.image.corruptions import WAYS, spoiled

SPLITS: tuple[ImageSplit, ...] = ("train", "heldout", "unseen")


def test_importing_the_starter_imports_neither_torch_nor_pillow() -> None:
    code = "import sys, raftune.starters.image; raise SystemExit(bool({'torch', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_caption_is_read_back_as_its_scene() -> None:
    assert len({scene.caption for scene in SCENES}) == len(SCENES) == 8 * 4 * 4 * 3
    assert all(scene_of(scene.caption) == scene for scene in SCENES)
    assert all(Scene.of(scene.labels) == scene for scene in SCENES)
    assert scene_of("A Red circle in the top left on a WHITE background.") == SCENES[0]
    assert scene_of("a red house in the top left on a white background") is None


def test_captions_are_english() -> None:
    assert Scene("orange", "cross", "top left", "grey").caption.startswith("an orange cross ")
    assert Scene("red", "cross", "top left", "grey").caption.startswith("a red cross ")


def test_the_splits_share_no_caption_and_leave_none_out() -> None:
    known = [set(scenes(split)) for split in SPLITS]
    assert sum(map(len, known)) == len(set().union(*known)) == len(SCENES)


def test_unseen_pairs_of_colour_and_shape_are_never_trained_on_but_each_alone_is() -> None:
    pairs = {split: {(scene.colour, scene.shape) for scene in scenes(split)} for split in SPLITS}
    assert len(pairs["unseen"]) == 4
    assert not pairs["unseen"] & (pairs["train"] | pairs["heldout"])
    for colour, shape in pairs["unseen"]:
        assert any(other == colour for other, _ in pairs["train"])
        assert any(other == shape for _, other in pairs["train"])


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_a_split_in_an_order_that_the_seed_gives(split: ImageSplit) -> None:
    captions = {scene.caption for scene in scenes(split)}
    assert set(prompts(split, len(captions), 3)) == captions
    assert prompts(split, 20, 3) == prompts(split, 20, 3) != prompts(split, 20, 4)
    assert len(prompts(split, 1000, 3)) == 1000


def test_an_image_is_its_background_but_for_a_shape_of_its_colour_in_its_quarter() -> None:
    for scene, pixels in zip(SCENES, paint(SCENES, np.random.default_rng(0)), strict=True):
        level = BACKGROUNDS[scene.background]
        differs = np.abs(pixels - level).max(-1) > 0.2
        x, y = (int(centre) for centre in POSITIONS[scene.position])
        assert np.abs(pixels[y, x] - COLOURS[scene.colour]).max() < 0.05
        rows, columns = np.nonzero(differs)
        assert abs(rows.mean() + 0.5 - POSITIONS[scene.position][1]) < 2.5
        assert abs(columns.mean() + 0.5 - POSITIONS[scene.position][0]) < 2.5


def test_shapes_vary_in_size_and_their_edges_are_soft() -> None:
    black = [Scene("yellow", "square", "top left", "black")] * 200
    painted = paint(black, np.random.default_rng(0), ANY_RADIUS)[..., 0]
    sides = np.sqrt((painted > 0.5).sum((1, 2)))
    assert sides.min() < 1.72 * 4.6
    assert sides.max() > 1.72 * 7.9
    assert ((painted > 0.2) & (painted < 0.8)).any((1, 2)).mean() > 0.9


def test_what_a_policy_samples_at_one_and_a_half_times_the_size_stays_within_the_sizes_that_the_judge_knows() -> None:
    assert USUAL_RADIUS[0] / 1.5 >= ANY_RADIUS[0]
    assert USUAL_RADIUS[1] <= ANY_RADIUS[1]


def test_equal_seeds_paint_equal_images() -> None:
    first, second = (paint(SCENES[:8], np.random.default_rng(5)) for _ in range(2))
    assert (first == second).all()
    assert (first != paint(SCENES[:8], np.random.default_rng(6))).any()


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_spoiling_changes_an_image_for_all_to_see(way: object) -> None:
    rng = np.random.default_rng(1)
    changed = [np.abs(way(one, rng) - one).mean() for one in paint(SCENES[::16], rng)]  # type: ignore[operator]
    assert np.median(changed) > 0.01


def test_spoiled_images_stay_in_range() -> None:
    found = spoiled(SCENES[:96], np.random.default_rng(2), ANY_RADIUS)
    assert found.shape == (96, SIZE, SIZE, 3)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_judge_agrees_with_the_generator_at_every_size() -> None:
    pixels = paint(SCENES, np.random.default_rng(7), ANY_RADIUS)
    found = judge([scene.caption for scene in SCENES], list(map(as_image, pixels)))
    assert np.mean([score == 1.0 for score in found]) >= 0.99


def test_the_judge_counts_the_attributes_that_are_there() -> None:
    shown, told = SCENES[0], SCENES[0]._replace(shape="cross", position="bottom right")
    image = as_image(paint([shown], np.random.default_rng(0))[0])
    assert judge([told.caption], [image]) == [0.5]
    assert all_right([told.caption, shown.caption], [image, image]) == [0.0, 1.0]
    assert compared([told.caption], [image]) == [(True, False, False, True)]


def test_the_judge_looks_at_images_of_any_size_and_says_nothing_of_other_captions() -> None:
    image = as_image(paint(SCENES[:1], np.random.default_rng(0))[0]).resize((48, 48), 1)
    assert judge([SCENES[0].caption, "a house"], [image, image], more=[1, 2]) == [1.0, None]
    assert judge([], []) == []
