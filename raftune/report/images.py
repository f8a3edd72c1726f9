"""Images of a report, each embedded once, up to a size limit.

Small images are embedded whole, larger ones as thumbnails.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from raftune.data.images import PIXELATED, mime_of, sha256_of_png, thumbnail
from raftune.errors import ConfigError, DataError, RaftuneError
from raftune.report.reading import RunReader, StageFile
from raftune.sanitize import first_line

PICTURE = "image_sha256"  # the column that names an image
LONGEST = 256  # pixels of a thumbnail's longer side
MOST_BYTES = 12_000_000  # of all images of a page
OTHERS = 64  # more bytes that the page needs to name an image and its size
FIRST = 8  # items whose images are made before it is known how large they are
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # numbers a pixel, by the kind of colour
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """An image as a page holds it: a data address, the size of the original, and where that lies if it is larger."""

    src: str
    width: int
    height: int
    lies: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.src) + OTHERS + 64

    def as_json(self) -> dict[str, Any]:
        lies = {} if self.lies is None else {"lies": self.lies}
        return {"src": self.src, "width": self.width, "height": self.height, **lies}


@dataclass
class ImageSet:
    """`shown` are the images of the page by hash; `made` are those at hand, also from the page before."""

    reader: RunReader
    made: dict[str, EmbeddedImage | None] = field(default_factory=dict)
    shown: dict[str, EmbeddedImage] = field(default_factory=dict)

    def up_to(self, items: list[Item], most: int, names: Callable[[Item], Iterable[str]]) -> list[Item]:
        """The first items whose images need no more than `most` bytes, one at least; what is shown is free."""
        taken: list[Item] = []
        room = MOST_BYTES - sum(image.nbytes for image in self.shown.values())
        spent, limit, ahead = 0, min(most, room), FIRST
        while len(taken) < len(items):
            batch = items[len(taken) : len(taken) + ahead]
            self.make(name for item in batch for name in names(item))
            for item in batch:
                new = {name: image for name in names(item) if (image := self.made[name]) and name not in self.shown}
                size = sum(image.nbytes for image in new.values())
                if taken and spent + size > limit:
                    return taken
                spent += size
                self.shown |= new
                taken.append(item)
            ahead = max(1, int((limit - spent) * len(taken) / spent)) if spent else len(items)
        return taken

    def make(self, names: Iterable[str]) -> None:
        """Reads and encodes these images; one that cannot be shown is noted, and is None."""
        missing = dict.fromkeys(name for name in names if name not in self.made)
        self.made |= dict.fromkeys(missing)
        for name, file, png in stored_images(self.reader, missing):
            try:
                if sha256_of_png(png) != name:
                    raise DataError("it has changed since it was generated")
                self.made[name] = embed(png, str(file))
            except ConfigError as error:
                why = f"images larger than {PIXELATED} pixels cannot be shown: {first_line(error)}"
                self.reader.note("the page", why)
            except (RaftuneError, ValueError) as error:
                why = f"{file.file}: image {name[:12]}…: {first_line(error).split('. ')[0]}"
                self.reader.note(f"round {file.round}, {file.stage}", why)

    def keep(self) -> None:
        """Forgets what is at hand and not shown."""
        for name in self.made.keys() - self.shown.keys():
            del self.made[name]

    def as_json(self) -> dict[str, Any]:
        return {name: picture.as_json() for name, picture in self.shown.items()}


def stored_images(reader: RunReader, names: Iterable[str]) -> Iterator[tuple[str, StageFile, bytes]]:
    """The bytes of each of these images that can be read, file by file."""
    by_file: defaultdict[StageFile, list[str]] = defaultdict(list)
    for name in names:
        if file := reader.pictures.get(name):
            by_file[file].append(name)
    for file, here in sorted(by_file.items()):
        waiting = set(here)
        for table in reader.groups(file.round, file.stage, file.file, [PICTURE, "completion"]):
            if table.num_columns < 2:
                continue  # noted when its rows were read
            kept = table.filter(pc.is_in(table.column(PICTURE), pa.array(sorted(waiting), pa.string())))
            columns = (kept.column(column).to_pylist() for column in (PICTURE, "completion"))
            for name, png in zip(*columns, strict=True):
                if name in waiting and isinstance(png, bytes):
                    waiting.discard(name)
                    yield name, file, png


def embed(png: bytes, lies: str) -> EmbeddedImage:
    """The image as a page holds it. Raises DataError for what is none, ConfigError for want of a library."""
    if not png.startswith(SIGNATURE) or len(png) < 33 or png[12:16] != b"IHDR":
        raise DataError("it is no PNG")
    width, height = struct.unpack(">II", png[16:24])
    if not width or not height:
        raise DataError(f"it has {width} x {height} pixels")
    small = max(width, height) <= PIXELATED
    if small:
        require_whole(png, width, height)
    shown = png if small else thumbnail(png, LONGEST)
    address = f"data:{mime_of(shown)};base64,{base64.b64encode(shown).decode()}"
    return EmbeddedImage(address, width, height, None if small else lies)


def require_whole(png: bytes, width: int, height: int) -> None:
    """Raises DataError unless every part of a small PNG has its checksum, and all of its pixels are there.

    A small image is embedded as it is, which needs no library.
    """
    at, kind, pixels = len(SIGNATURE), b"", b""
    while kind != b"IEND":
        if at + 12 > len(png):
            raise DataError("it is cut off")
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, body, check = png[at + 4 : at + 8], png[at + 8 : at + 8 + size], png[at + 8 + size : at + 12 + size]
        if len(check) < 4 or struct.unpack(">I", check)[0] != zlib.crc32(body, zlib.crc32(kind)):
            raise DataError("it is cut off, or a checksum in it is wrong")
        pixels += body if kind == b"IDAT" else b""
        at += 12 + size
    depth, colour, interlaced = png[24], png[25], png[28]
    needed = height * (1 + (width * depth * CHANNELS.get(colour, 0) + 7) // 8)
    try:
        there = len(zlib.decompressobj().decompress(pixels, needed + 1))
    except zlib.error as error:
        raise DataError(f"its pixels cannot be read: {error}") from error
    if there != needed and not interlaced:
        raise DataError(f"it has {there:,} bytes of pixels, not {needed:,}")


__all__ = ["EmbeddedImage", "ImageSet", "embed"]
