"""Measures of images against closed forms: pixels, distances, and the vectors of a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raftune.data.images import png_of
from raftune.evaluation.images import (
    SIDE,
    FeatureMetrics,
    PixelMetrics,
    cosine_distance,
    look_of,
    looked_at,
    nearest,
    rms_distance,
    thumbnails,
    vendi_score,
)
from raftune.evaluation.metrics import ValidityMetrics
from raftune.rewards.builtin import colour


def plain_image(colour_: Any, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour_)


def noise(seed: int, size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples(groups: dict[str, list[Image.Image | None]], **columns: Any) -> pa.Table:
    """One row an image of each prompt; None is an invalid sample."""
    rows = [
        {
            "sample_id": f"{name}/{k}",
            "prompt_id": name,
            "k": k,
            "completion": None if image is None else png_of(image),
            "invalid": "not finite" if image is None else None,
            "latents": b"x",
        }
        for name, images in groups.items()
        for k, image in enumerate(images)
    ]
    schema = pa.schema(
        {
            "sample_id": pa.string(),
            "prompt_id": pa.string(),
            "k": pa.int32(),
            "completion": pa.binary(),
            "invalid": pa.string(),
            "latents": pa.binary(),
        }
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


@pytest.mark.parametrize(
    ("colours", "brightness", "saturation", "contrast", "burnt"),
    [
        ((0, 0, 0), 0.0, 0.0, 0.0, 1.0),
        ((255, 255, 255), 1.0, 0.0, 0.0, 1.0),
        ((255, 0, 0), 0.299, 1.0, 0.0, 1.0),
        ((102, 51, 51), (0.299 * 102 + 0.701 * 51) / 255, 0.5, 0.0, 0.0),
    ],
)
def test_a_plain_image_has_the_numbers_of_its_colour(
    colours: Any, brightness: float, saturation: float, contrast: float, burnt: float
) -> None:
    found = look_of(plain_image(colours))
    expected = {
        "brightness": brightness,
        "saturation": saturation,
        "contrast": contrast,
        "saturated_ratio": burnt,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_half_black_half_white_has_the_largest_contrast() -> None:
    image = plain_image((0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 32))
    assert look_of(image)["contrast"] == pytest.approx(0.5)
    assert look_of(image)["brightness"] == pytest.approx(0.5)


def test_an_image_looks_to_a_metric_as_it_looks_to_the_reward_of_that_name() -> None:
    image = noise(0)
    pixels = np.asarray(image, np.float64) / 255
    found = look_of(image)
    for name in ("brightness", "saturation", "contrast"):
        assert found[name] == pytest.approx(colour.MEASURES[name](pixels), abs=1e-12)


def test_what_is_looked_at_keeps_no_bytes_and_an_invalid_sample_has_no_looks() -> None:
    table = looked_at(samples({"a": [noise(0), None], "b": [noise(1, 40), noise(2, 8)]}))
    assert not {"completion", "latents"} & set(table.column_names)
    assert table.column("thumbnail").null_count == table.column("contrast").null_count == 1
    assert table.nbytes < 4 * (SIDE * SIDE * 3 + 300)
    rows, small = thumbnails(table)
    assert rows.tolist() == [0, 2, 3] and small.shape == (3, SIDE * SIDE * 3)
    np.testing.assert_allclose(small[0].mean(), np.asarray(noise(0)).mean() / 255, atol=0.004)


def test_images_of_one_prompt_are_as_far_apart_as_their_colours() -> None:
    """Black and white are 1 apart; of black, black, white two of three pairs are."""
    black, white = plain_image((0, 0, 0)), plain_image((255, 255, 255))
    found = PixelMetrics()(looked_at(samples({"a": [black, white], "b": [black, black, white], "c": [white]})))
    assert found["pixel_distance"]["mean"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)
    assert found["pixel_distance"]["n"] == 2  # a prompt with one image has no pair
    assert found["near_duplicates"] == 1.0


def test_near_duplicates_are_found_across_prompts_sizes_and_a_little_noise() -> None:
    image = Image.fromarray(np.asarray(noise(0)) // 2 + 60)
    other = np.asarray(image).astype(int) + np.random.default_rng(1).integers(-3, 4, (32, 32, 3))
    near = Image.fromarray(np.clip(other, 0, 255).astype(np.uint8))
    larger = image.resize((64, 64), Image.Resampling.NEAREST)
    found = PixelMetrics()(
        looked_at(samples({"a": [image], "b": [near], "c": [larger], "d": [noise(9)], "e": [noise(8)]}))
    )
    assert found["near_duplicates"] == pytest.approx(3 / 5)


def test_the_nearest_other_one_is_the_same_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).random((37, 12))
    groups = np.arange(37) // 3
    apart = np.sqrt(((x[:, None] - x[None]) ** 2).mean(axis=2))
    apart[groups[:, None] == groups[None]] = np.inf
    monkeypatch.setattr("raftune.evaluation.images.BLOCK", 10)
    found, which = nearest(x, groups)
    np.testing.assert_allclose(found, apart.min(axis=1), atol=1e-5)
    np.testing.assert_array_equal(which, apart.argmin(axis=1))


def test_one_image_alone_repeats_nothing() -> None:
    found = PixelMetrics()(looked_at(samples({"a": [noise(0)]})))
    assert found["near_duplicates"] == 0.0 and found["pixel_distance"] is None
    assert found["brightness"]["n"] == 1


def test_invalid_samples_are_counted_and_otherwise_left_out() -> None:
    table = samples({"a": [noise(0), None], "b": [None, None]})
    assert ValidityMetrics()(table) == {"invalid_ratio": 0.75}
    found = PixelMetrics()(looked_at(table))
    assert found["saturation"]["n"] == 1


def test_without_any_image_nothing_is_measured() -> None:
    nothing = pa.nulls(2, pa.list_(pa.float32()))
    table = looked_at(samples({"a": [None, None]}, features=nothing, features_start=nothing))
    assert {*PixelMetrics()(table).values(), *FeatureMetrics()(table).values()} == {None}


# -- vectors ----------------------------------------------------------------------------------------------------------


def chunk(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))


@pytest.mark.parametrize("k", [2, 3, 8])
def test_the_vendi_score_is_one_for_equal_and_k_for_orthogonal_vectors(k: int) -> None:
    assert vendi_score(np.tile(chunk(np.ones((1, 16))), (k, 1))) == pytest.approx(1.0, abs=1e-9)
    assert vendi_score(np.eye(16)[:k]) == pytest.approx(k, abs=1e-9)


def test_the_vendi_score_of_two_clusters_is_two() -> None:
    assert vendi_score(np.eye(4)[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2.0)


def test_the_vendi_score_of_two_vectors_is_the_entropy_of_half_plus_and_minus_half_their_cosine() -> None:
    for angle in (0.3, 1.0, 2.0):
        shares = np.array([1 + math.cos(angle), 1 - math.cos(angle)]) / 2
        x = np.array([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        assert vendi_score(x) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


def test_the_distance_is_the_mean_over_pairs() -> None:
    x = chunk(np.random.default_rng(0).standard_normal((6, 5)))
    pairs = [1 - x[i] @ x[j] for i in range(6) for j in range(i)]
    assert cosine_distance(x) == pytest.approx(np.mean(pairs))
    apart = [np.sqrt(((x[i] - x[j]) ** 2).mean()) for i in range(6) for j in range(i)]
    assert rms_distance(x) == pytest.approx(np.mean(apart))


def test_drift_pairs_the_start_s_image_of_the_same_prompt_and_seed() -> None:
    kind = pa.list_(pa.float32())
    now = pa.array([[1.0, 0.0], [0.0, 2.0], None, [1.0, 0.0]], kind)
    start = pa.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], None], kind)
    table = samples({"a": [noise(0), noise(1)], "b": [None, noise(2)]}, features=now, features_start=start)
    found = FeatureMetrics()(looked_at(table))
    assert found["feature_drift"]["mean"] == pytest.approx(0.5) and found["feature_drift"]["n"] == 1
    assert found["feature_distance"]["mean"] == pytest.approx(1.0)
    assert found["vendi"]["mean"] == pytest.approx(2.0)
