"""Encodes a given image as PNG and clean latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raftune.data.images import as_rgb, image_of, png_of, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.policies.diffusion.latents import NONE, columns_of
from raftune.policies.diffusion.pipelines.base import PipelineAdapter
from raftune.policies.diffusion.sample import NO_PICTURE
from raftune.records import INVALID, Prompt


def adopted(
    binding: PipelineAdapter, prompt: Prompt, answer: Any, source: str, size: tuple[int, int]
) -> Mapping[str, Any]:
    """The payload of an image of this size (height, width). Raises DataError for any other.

    Its latents are a draw from the VAE's posterior by a generator that the image's own hash seeds.
    """
    if answer is None and source == "teacher":
        return {**NO_PICTURE, INVALID: "the teacher's sample came to nothing"}
    image = picture_of(answer, prompt, source)
    refuse_other_size(image, prompt, source, size)
    png = png_of(image)
    name, why = sha256_of_png(png), why_invalid(image)
    latents: Mapping[str, Any] = NONE
    if why is None:
        generator = torch.Generator("cpu").manual_seed(int(name[:15], 16))
        with torch.inference_mode():
            latents = columns_of(binding.to_latents([image], generator)[0])
    return {"completion": png, "image_sha256": name, INVALID: why, **latents}


def picture_of(answer: Any, prompt: Prompt, source: str) -> Image.Image:
    """The image that an answer is: bytes of a file, a PIL image, a path, or `datasets`' mapping of bytes and path."""
    try:
        if isinstance(answer, Image.Image):
            return as_rgb(answer)
        if isinstance(answer, Mapping) and (answer.get("bytes") or answer.get("path")):
            answer = answer.get("bytes") or answer.get("path")
        if isinstance(answer, (bytes, bytearray)):
            return image_of(bytes(answer))
        if isinstance(answer, (str, Path)):
            return image_of(Path(answer).expanduser().read_bytes())
    except OSError as error:
        where = f"{answer!r} (looked for from {Path.cwd()})"
        raise DataError(
            f"an image for prompt {prompt.id} ({source}) must be a file that can be read; {where} is none: "
            f"{error.strerror or error}."
        ) from error
    except DataError as error:
        raise DataError(f"the image for prompt {prompt.id} ({source}): {error}") from error
    raise DataError(
        f"an answer to prompt {prompt.id} ({source}) must be an image: bytes of a PNG or JPEG file, a PIL image, or a "
        f"path; got {answer!r:.80}."
    )


def refuse_other_size(image: Image.Image, prompt: Prompt, source: str, size: tuple[int, int]) -> None:
    """Raises DataError for an image of another size than the run's."""
    height, width = size
    if (image.height, image.width) != size:
        raise DataError(
            f"images must all be of the size that the run draws, {width} x {height}; the one for prompt {prompt.id} "
            f"({source}) is {image.width} x {image.height}. Crop or scale it first, as you want it to be learned, or "
            "set sampling.diffusion.height and .width."
        )
