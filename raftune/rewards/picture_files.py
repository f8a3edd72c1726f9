"""Reads images with prompts from a folder or a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from raftune.data.columns import find
from raftune.data.images import SUFFIXES, image_of, is_picture, sha256_of_png
from raftune.data.rows import SkippedRow, SkipReason, UnusableRow
from raftune.errors import DataError
from raftune.records import Row

PICTURE = ("image", "image", "completion")  # columns that may hold an image, or the path of one
CAPTION = ("prompt", "caption", "text")
METADATA = "metadata.jsonl"  # as the folders of images that `datasets` reads have it
FILE_NAME = "file_name"
ImageSource = Path | bytes


class ImageFiles(Sequence[Any]):
    """The images at these places, each read when it is asked for; `names` say which is which."""

    def __init__(self, places: Sequence[ImageSource], names: Sequence[str]) -> None:
        self.places, self.names = places, names

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """The image, RGB. Raises DataError where it can no longer be read."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return image_of(content(self.places[index]))


def is_folder(source: str) -> bool:
    """Whether the source is a folder of images."""
    path = Path(source).expanduser()
    return path.is_dir() and ((path / METADATA).is_file() or any(is_picture_file(one) for one in path.iterdir()))


def is_picture_file(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def folder_rows(source: str, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """A row an image: of metadata.jsonl (file_name and other columns), else each image with the text file beside it.

    Raises DataError where neither says what an image shows.
    """
    folder = Path(source).expanduser()
    if (folder / METADATA).is_file():
        for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                yield number, metadata_row(number, line)
        return
    paths = sorted(path for path in folder.iterdir() if is_picture_file(path))
    if not any(path.with_suffix(".txt").is_file() for path in paths):
        raise DataError(
            f"{field}: {folder} holds images and no prompts. Add {METADATA} with a line for each, "
            '{"file_name": "a.png", "prompt": "a red disc"}, or a text file of the same name beside each image.'
        )
    for number, path in enumerate(paths, 1):
        beside = path.with_suffix(".txt")
        row = {"prompt": beside.read_text(encoding="utf-8").strip()} if beside.is_file() else {}
        yield number, {"image": path.name, **row}


def metadata_row(number: int, line: str) -> Row | SkippedRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        return SkippedRow(number, SkipReason.BROKEN, f"not valid JSON: {error}")
    if not isinstance(row, dict) or FILE_NAME not in row:
        return SkippedRow(number, SkipReason.MISSING, f"there is no {FILE_NAME}")
    return {"image": row.pop(FILE_NAME), **row}


def holds_picture(row: Row) -> bool:
    """Whether a column of the row holds an image, or the path of one."""
    return any(is_picture(row.get(name)) for name in PICTURE)


def one_picture(row: Row, base: Path) -> tuple[Any, ImageSource, str, Row]:
    """Prompt, place and name of the image, and all other columns; paths begin in `base`. Raises Unusable."""
    caption, prompt = find(row, CAPTION)
    if not isinstance(prompt, str | int | list):
        raise UnusableRow(
            SkipReason.WRONG_TYPE, f"{caption} must be a text or a class label; got {type(prompt).__name__}"
        )
    column = next((name for name in PICTURE if is_picture(row.get(name))), None)
    if column is None:
        raise UnusableRow(SkipReason.MISSING, f"there is no image in {', '.join(row)}")
    value = row[column]
    value = (value.get("bytes") or value["path"]) if isinstance(value, dict) else value
    place = value if isinstance(value, bytes) else base / Path(value).expanduser()
    try:
        image_of(content(place))
    except (DataError, OSError) as error:
        raise UnusableRow(SkipReason.BROKEN, f"{column}: {error}") from None
    name = f"{sha256_of_png(place)}.png" if isinstance(place, bytes) else str(value)
    return prompt, place, name, {key: one for key, one in row.items() if key not in (caption, column)}


def content(place: ImageSource) -> bytes:
    return place if isinstance(place, bytes) else place.read_bytes()
