"""Images go to bytes and back without loss, and what is no image is said."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from raftune.data.images import image_of, mime_of, png_of, require_pillow, sha256_of_png, thumbnail, why_invalid
from raftune.errors import ConfigError, DataError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB")


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (32, 32), (65, 129)])
def test_an_image_survives_png_pixel_for_pixel(size: tuple[int, int]) -> None:
    image = noise(*size)
    again = image_of(png_of(image))
    assert again.mode == "RGB" and again.size == size
    assert np.array_equal(np.asarray(again), np.asarray(image))


def test_equal_pixels_give_equal_bytes_whatever_the_file_said() -> None:
    image = noise(8, 8)
    buffer, words = io.BytesIO(), PngImagePlugin.PngInfo()
    words.add_text("prompt", "a red circle")
    image.save(buffer, format="PNG", pnginfo=words, compress_level=1, dpi=(300, 300))
    described = Image.open(io.BytesIO(buffer.getvalue()))
    assert png_of(described) == png_of(image)
    assert b"a red circle" not in png_of(described)
    assert sha256_of_png(png_of(described)) == sha256_of_png(png_of(image))


def test_other_pixels_give_another_name() -> None:
    assert sha256_of_png(png_of(noise(8, 8, 0))) != sha256_of_png(png_of(noise(8, 8, 1)))
    assert len(sha256_of_png(b"")) == 64


def test_transparent_images_get_a_white_background_and_grey_becomes_rgb() -> None:
    assert image_of(png_of(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert image_of(png_of(Image.new("L", (2, 2), 77))).getpixel((1, 1)) == (77, 77, 77)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert image_of(png_of(palette)).getpixel((0, 0)) == (10, 20, 30)


def test_jpeg_bytes_are_an_image_too() -> None:
    buffer = io.BytesIO()
    noise(16, 8).save(buffer, format="JPEG")
    assert image_of(buffer.getvalue()).size == (16, 8)


@pytest.mark.parametrize("what", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\x00" * 100])
def test_bytes_that_are_no_image_are_refused(what: bytes) -> None:
    with pytest.raises(DataError, match=f"these {len(what)} bytes are no image"):
        image_of(what)


def test_an_image_that_was_cut_off_is_refused() -> None:
    with pytest.raises(DataError, match=r"no image|read whole"):
        image_of(png_of(noise(64, 64))[:2000])


def test_a_tiny_image_is_its_own_thumbnail() -> None:
    png = png_of(noise(32, 32))
    assert thumbnail(png, 256) == png
    assert mime_of(png) == "image/png"


def test_a_large_image_gets_smaller_and_keeps_its_shape() -> None:
    png = png_of(noise(400, 200))
    small = thumbnail(png, 100)
    assert image_of(small).size == (100, 50)
    assert mime_of(small) == "image/webp"
    assert len(small) < len(png) / 10
    assert thumbnail(png, 100) == small


def test_a_flat_image_is_invalid_and_one_pixel_that_differs_makes_it_valid() -> None:
    image = Image.new("RGB", (8, 8), (3, 200, 7))
    assert why_invalid(image) == "flat: every pixel is the same colour"
    image.putpixel((5, 5), (3, 200, 8))
    assert why_invalid(image) is None


def test_without_pillow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"raftune\[images\]"):
        require_pillow()


def test_importing_it_reads_neither_pillow_nor_torch() -> None:
    code = "import sys, raftune.data.images; sys.exit(bool({'PIL', 'torch', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize(
    ("levels", "form"),
    [
        (np.linspace(0, 65535, 256).astype(np.uint16), "PNG"),
        (np.linspace(0, 65535, 256).astype(np.uint16), "TIFF"),
        (np.linspace(0, 65535, 256).astype(np.int32), "TIFF"),
        (np.linspace(0, 1, 256).astype(np.float32), "TIFF"),
        (np.linspace(0, 255, 256).astype(np.float32), "TIFF"),
    ],
)
def test_deep_grey_is_scaled_and_not_clipped(levels: Any, form: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(levels.reshape(16, 16)).save(buffer, format=form)
    found = np.asarray(image_of(buffer.getvalue())).reshape(-1, 3)
    assert (found == np.arange(256)[:, None]).all()
    assert image_of(png_of(Image.open(buffer))).tobytes() == found.tobytes()


@pytest.mark.parametrize("levels", [np.array([[-1.0, 2.0]]), np.array([[0.0, np.nan]]), np.array([[0.0, 1000.0]])])
def test_grey_levels_of_no_known_range_are_refused(levels: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(levels.astype(np.float32)).save(buffer, format="TIFF")
    with pytest.raises(DataError, match=r"a grey image's levels must be in 0 … 1 or 0 … 255; these go from"):
        image_of(buffer.getvalue())
