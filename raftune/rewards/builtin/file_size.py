"""Reward `file_size`: the compressed size of an image in bytes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.errors import ConfigError
from raftune.rewards.batch import images
from raftune.rewards.fingerprint import digest
from raftune.rewards.registry import BuiltInReward, builtin


@builtin("file_size", media=("image",), example={"format": "jpeg"})
@dataclass
class FileSizeReward(BuiltInReward):
    """Compressed size of the image as JPEG or PNG, in thousands of bytes.

    With a weight of -1 a policy learns images that compress well, with 1 images full of detail (Black et al. 2023,
    arXiv 2305.13301).
    """

    format: Annotated[Literal["jpeg", "png"], Field(description="The image format.")] = "jpeg"
    quality: Annotated[int, Field(description="JPEG quality, 1 to 100; not used for PNG.")] = 95

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"file_size: quality must be from 1 to 100; got {self.quality}. Write 95, say.")

    @cached_property
    def fingerprint(self) -> str:
        return digest("file_size", 1, self.format, self.quality if self.format == "jpeg" else 0)

    def __call__(self, *, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        options = {"quality": self.quality} if self.format == "jpeg" else {"compress_level": 9}
        sizes: list[float | None] = []
        for image in images(completions, self.name):
            buffer = io.BytesIO()
            image.save(buffer, format=self.format.upper(), **options)
            sizes.append(len(buffer.getvalue()) / 1000)
        return sizes
