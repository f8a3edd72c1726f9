"""Encodes and decodes images as PNG.

A stored image is a PNG, lossless RGB; its name is the SHA-256 of those bytes.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from raftune.errors import ConfigError, DataError
from raftune.store.files import sha256_hex

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: how bright red, green and blue look
PIXELATED = 64  # pixels: a thumbnail up to this side is exact; a larger one may lose detail


def require_pillow() -> Any:
    """The module PIL.Image. Raises ConfigError without Pillow, with the command that installs it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError('images need Pillow, which is not installed. Run: pip install "raftune[images]"') from error
    return Image


def png_of(image: Image.Image) -> bytes:
    """The image as PNG: RGB, lossless, without metadata; equal pixels give equal bytes.

    Raises DataError for an image that cannot be read whole (a truncated file).
    """
    plain = require_pillow().new("RGB", image.size)  # a new image has no profile and no comment
    plain.paste(as_rgb(image))
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def image_of(png: bytes) -> Image.Image:
    """The RGB image that these bytes hold: PNG, or another format that Pillow reads, transparency on white.

    Raises DataError for bytes that are not a whole image.
    """
    pillow = require_pillow()
    try:
        with pillow.open(io.BytesIO(png)) as image:
            return as_rgb(image)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        unknown = type(error).__name__ == "UnidentifiedImageError"  # its message has nothing but an address in memory
        reason = "" if unknown else f": {error}"
        raise DataError(f"these {len(png):,} bytes are no image{reason}. An image is a PNG or JPEG file.") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB with 8 bits a channel, upright as its EXIF says, transparency on white.

    Deeper grey is scaled, where Pillow would clip it: 16 bits by their range; whole numbers of 32 bits and floats,
    which have no declared range, from 0 … 1, 0 … 255 or (whole numbers) 0 … 65535. Raises DataError for other levels.
    """
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F" or upright.mode.startswith("I"):
            upright = _grey_in_8_bits(upright)
        if not upright.has_transparency_data:
            return upright.convert("RGB") if upright.mode != "RGB" else upright.copy()
        white = require_pillow().new("RGBA", upright.size, (255, 255, 255, 255))
        white.alpha_composite(upright.convert("RGBA"))
        flat: Image.Image = white.convert("RGB")
        return flat
    except (OSError, SyntaxError) as error:
        raise DataError(f"an image cannot be read whole: {error}. Give it again.") from error


def _grey_in_8_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    levels = np.asarray(image, dtype=np.float64)
    low, high = float(levels.min()), float(levels.max())
    ranges = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif not (full := next((end for end in ranges if low >= 0 and high <= end), 0.0)):
        allowed = "0 … 1 or 0 … 255" if image.mode == "F" else "0 … 65535"
        raise DataError(f"a grey image's levels must be in {allowed}; these go from {low:g} to {high:g}. Scale them.")
    grey: Image.Image = require_pillow().fromarray(np.rint(levels * (255.0 / full)).astype(np.uint8))
    return grey


def sha256_of_png(png: bytes) -> str:
    """The name of an image: 64 hexadecimal digits."""
    return sha256_hex([png])


def thumbnail(png: bytes, longest: int) -> bytes:
    """The image with no side above `longest` pixels: PNG if it is tiny already, else WebP of fixed quality."""
    image = image_of(png)
    if max(image.size) <= min(longest, PIXELATED):
        return png_of(image)
    image.thumbnail((longest, longest), require_pillow().Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80, method=4)
    return buffer.getvalue()


def why_invalid(image: Image.Image) -> str | None:
    """Why nothing can be learned from this image; None for a valid one."""
    if not all(image.size):
        return "empty: it has no pixels"
    extrema: Any = image.convert("RGB").getextrema()
    return "flat: every pixel is the same colour" if all(low == high for low, high in extrema) else None


def mime_of(data: bytes) -> str:
    """The media type of an image's bytes, for a data URL."""
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/jpeg" if data.startswith(b"\xff\xd8") else "image/png"


class LazyImages(Sequence[Any]):
    """The images of a column of bytes, decoded on access; `pngs` and `names` are Arrow columns, row for row."""

    def __init__(self, pngs: Any, names: Any) -> None:
        self.pngs, self.names = pngs, names

    def __len__(self) -> int:
        return len(self.pngs)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        """The image, RGB. Raises DataError that names the sample whose bytes are no image."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            return image_of(self.pngs[index].as_py() or b"")
        except DataError as error:
            raise DataError(f"sample {self.names[index].as_py()}: {error}") from error


def is_picture(value: Any) -> bool:
    """True of bytes, of a path by its suffix, of a PIL image, and of `datasets`' {"bytes": …, "path": …}."""
    if isinstance(value, dict):
        return bool({"bytes", "path"} & value.keys()) and is_picture(value.get("bytes") or value.get("path"))
    if isinstance(value, str):
        return value.lower().endswith(SUFFIXES)
    return isinstance(value, bytes) or hasattr(value, "getextrema")


def content_of(value: Any, base: Path) -> bytes:
    """The bytes of what `is_picture`; paths are relative to `base`. Raises OSError for a file that is not there."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return (base / Path(value).expanduser()).read_bytes()
    return value if isinstance(value, bytes) else png_of(value)


def in_words(png: bytes) -> str:
    """An image for a line of text: the beginning of its name, and its width and height."""
    size = ""
    if png.startswith(b"\x89PNG") and len(png) >= 24:
        width, height = struct.unpack(">II", png[16:24])
        size = f" {width}×{height}"
    return f"{sha256_of_png(png)[:12]}.png{size}"
