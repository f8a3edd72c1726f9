"""Images stand in a page once, whole where they are small, and one that is damaged is none."""

from __future__ import annotations

import base64
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import pytest

from raftune.errors import DataError
from raftune.report.images import EmbeddedImage, ImageSet, embed
from raftune.report.reading import RunReader
from raftune.store.run import RunFolder
from tests.runs.report_image_pages import chunk, png

PLACE = "round-0001/generate/chunk-00000.parquet"
RED, BLUE = (200, 0, 0), (0, 0, 200)


def shown(picture: EmbeddedImage) -> bytes:
    return base64.b64decode(picture.src.partition(",")[2])


def test_a_small_image_is_embedded_as_stored_also_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    small = png(RED, BLUE, size=(64, 48))
    found = embed(small, PLACE)
    assert found.src.startswith("data:image/png;base64,")
    assert shown(found) == small
    assert (found.width, found.height, found.lies) == (64, 48, None)


def test_a_larger_image_becomes_a_thumbnail_that_says_where_the_image_lies() -> None:
    image = pytest.importorskip("PIL.Image")
    found = embed(png(RED, BLUE, size=(600, 300)), PLACE)
    assert image.open(io.BytesIO(shown(found))).size == (256, 128)
    assert found.as_json() == {"src": found.src, "width": 600, "height": 300, "lies": PLACE}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda whole: b"GIF89a" + whole, "it is no PNG"),
        (lambda whole: b"", "it is no PNG"),
        (lambda whole: whole[:-5], "cut off"),
        (lambda whole: whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], "cut off, or a checksum in it is wrong"),
        (lambda whole: whole[:33] + chunk(b"IDAT", b"no zlib") + chunk(b"IEND", b""), "its pixels cannot be read"),
        (lambda whole: png(RED, size=(4, 3))[:33] + whole[33:], "bytes of pixels, not"),
    ],
)
def test_a_small_image_that_is_damaged_is_refused_with_the_reason(damage: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        embed(damage(png(RED, BLUE, size=(4, 4))), PLACE)


class ImageFiles:
    """Images that need no run: what an album reads from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int) -> None:
        self.files = [png((number, 0, 0)) for number in range(count)]
        self.names = [hashlib.sha256(file).hexdigest() for file in self.files]
        self.asked: list[str] = []
        self.album = ImageSet(RunReader(RunFolder(tmp_path)))
        monkeypatch.setattr("raftune.report.images.stored_images", self.stored_images)

    def stored_images(self, reader: RunReader, names: Any) -> Any:
        for name in names:
            self.asked.append(name)
            yield name, PLACE, self.files[self.names.index(name)]

    def up_to(self, items: list[list[int]], most: int) -> list[list[int]]:
        return self.album.up_to(items, most, lambda item: [self.names[number] for number in item])


def test_items_are_shown_while_their_images_fit_and_one_always_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shelf = ImageFiles(monkeypatch, tmp_path, 40)
    items = [[2 * number, 2 * number + 1] for number in range(20)]
    one = embed(shelf.files[0], PLACE).nbytes
    room = 7 * one
    assert shelf.up_to(items, room) == items[:3]
    assert sum(picture.nbytes for picture in shelf.album.shown.values()) <= room
    assert len(shelf.asked) <= 16  # what does not fit is not read either, but for the first few
    assert shelf.up_to([[30]], 0) == [[30]]


def test_an_image_that_the_page_shows_already_costs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shelf = ImageFiles(monkeypatch, tmp_path, 4)
    assert shelf.up_to([[0], [1]], 10**6) == [[0], [1]]
    assert shelf.up_to([[2], [0], [1], [3]], embed(shelf.files[2], PLACE).nbytes + 10) == [[2], [0], [1]]
    assert len(shelf.asked) == len(set(shelf.asked))


def test_what_a_page_had_at_hand_is_not_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shelf = ImageFiles(monkeypatch, tmp_path, 6)
    shelf.up_to([[0], [1]], 10**6)
    shelf.album.keep()
    again = ImageSet(shelf.album.reader, shelf.album.made)
    shelf.asked.clear()
    again.up_to([[1], [5]], 10**6, lambda item: [shelf.names[number] for number in item])
    assert shelf.asked == [shelf.names[5]]
    again.keep()
    assert again.made.keys() == {shelf.names[1], shelf.names[5]}
