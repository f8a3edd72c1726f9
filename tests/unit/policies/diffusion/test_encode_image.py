"""Somebody else's images: a person's, a teacher's, a reference data set's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raftune.data.images import image_of, png_of
from raftune.errors import DataError
from raftune.policies.diffusion import Diffusion
from raftune.policies.diffusion.images import latents_of
from raftune.records import Prompt
from tests.pipelines import SIZE, save_tiny
from tests.unit.policies.diffusion.runs import policy

PROMPT = Prompt("p0", "a red circle")


@pytest.fixture(scope="module")
def adopter(tmp_path_factory: pytest.TempPathFactory) -> Diffusion:
    root = tmp_path_factory.mktemp("adopting")
    return policy(save_tiny("sd", root / "sd"), root)


def random_image(width: int = SIZE, height: int = SIZE) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_every_form_of_an_image_is_the_same_image(
    adopter: Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = png_of(random_image())
    (tmp_path / "one.png").write_bytes(png)
    monkeypatch.chdir(tmp_path)
    forms: list[Any] = [
        png,
        random_image(),
        "one.png",
        tmp_path / "one.png",
        {"bytes": png, "path": None},
        {"bytes": None, "path": "one.png"},
    ]
    found = [dict(adopter.encode_completion(PROMPT, form, "column:photo")) for form in forms]
    assert all(one == found[0] for one in found)
    assert found[0]["completion"] == png and found[0]["invalid"] is None
    assert set(found[0]) == set(adopter.payload.names)


def test_latents_are_the_vae_s_scaled_and_the_same_each_time(adopter: Diffusion) -> None:
    payload = adopter.encode_completion(PROMPT, random_image(), "column:photo")
    x0 = latents_of(payload["latents"], payload["latents_shape"], payload["latents_dtype"])
    vae = adopter.frozen.pipe.vae
    pixels = torch.from_numpy(np.asarray(random_image(), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    mean, std = (part[0] * vae.config.scaling_factor for part in (posterior.mean, posterior.std))
    assert ((x0 - mean).abs() <= 6 * std).all(), "a draw from the posterior; 256 numbers beyond 6 sigma: p < 1e-6"
    assert payload == adopter.encode_completion(PROMPT, random_image(), "reference")


def test_reading_an_image_needs_no_denoiser(adopter: Diffusion) -> None:
    fresh = Diffusion.load(adopter.config, adopter.folder, adopter.start_folder)
    fresh.encode_completion(PROMPT, random_image(), "column:photo")
    assert fresh.nbytes == fresh.frozen.nbytes


def test_transparent_images_get_a_white_background(adopter: Diffusion) -> None:
    image = random_image().convert("RGBA")
    image.putpixel((3, 4), (0, 0, 0, 0))
    payload = adopter.encode_completion(PROMPT, image, "column:photo")
    assert image_of(payload["completion"]).getpixel((3, 4)) == (255, 255, 255)


def test_a_jpeg_is_kept_as_it_decodes(adopter: Diffusion) -> None:
    buffer = io.BytesIO()
    random_image().save(buffer, format="JPEG")
    payload = adopter.encode_completion(PROMPT, buffer.getvalue(), "column:photo")
    assert payload["completion"] == png_of(image_of(buffer.getvalue()))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            random_image(24, 16),
            r"size that the run generates, 16 x 16; the one for prompt p0 \(column:photo\) is 24 x 16. Crop",
        ),
        ("nowhere.png", r"must be a file that can be read; 'nowhere.png' \(looked for from .*\) is none: No such file"),
        (b"no image at all", r"the image for prompt p0 \(column:photo\): these 15 bytes are no image"),
        (3, r"must be an image: bytes of a PNG or JPEG file, a PIL image, or a path; got 3"),
        (None, r"must be an image"),
        ({"bytes": None, "path": None}, r"must be an image"),
    ],
)
def test_what_is_no_image_of_the_run_s_size_is_refused(answer: Any, message: str, adopter: Diffusion) -> None:
    with pytest.raises(DataError, match=message):
        adopter.encode_completion(PROMPT, answer, "column:photo")


def test_a_teacher_s_invalid_sample_stays_invalid(adopter: Diffusion) -> None:
    payload = adopter.encode_completion(PROMPT, None, "teacher")
    assert payload["invalid"] == "the teacher's sample came to nothing"
    assert payload["completion"] is None and payload["latents"] is None


def test_a_flat_image_is_nothing_to_learn_from(adopter: Diffusion) -> None:
    payload = adopter.encode_completion(PROMPT, Image.new("RGB", (SIZE, SIZE), "red"), "teacher")
    assert payload["invalid"] == "flat: every pixel is the same colour" and payload["latents"] is None
