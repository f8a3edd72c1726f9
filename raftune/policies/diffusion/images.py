"""Payloads of images: a PNG, and clean latents as Parquet columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from raftune.data.images import as_rgb, image_of, png_of, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, SampledImages
from raftune.records import INVALID, LATENTS, Prompt

DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}  # numpy has no bfloat16: its bits
FIELDS = (
    pa.field(LATENTS, pa.binary()),
    pa.field("latents_shape", pa.list_(pa.int32())),
    pa.field("latents_dtype", pa.string()),
)
PAYLOAD = pa.schema(
    [
        pa.field("completion", pa.binary()),
        pa.field("image_sha256", pa.string()),
        pa.field(INVALID, pa.string()),
        *FIELDS,
    ]
)
NO_LATENTS: Mapping[str, Any] = {field.name: None for field in FIELDS}
NO_IMAGE: Mapping[str, Any] = {"completion": None, "image_sha256": None, **NO_LATENTS}


# -- latents as columns ------------------------------------------------------------------------------------------------


def columns_of(x0: torch.Tensor) -> dict[str, Any]:
    """One image's latents (C, h, w) as little-endian bytes, with their shape and dtype."""
    plain = x0.detach().cpu().contiguous()
    array = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    dtype = str(plain.dtype).removeprefix("torch.")
    return {LATENTS: content, "latents_shape": list(plain.shape), "latents_dtype": dtype}


def latents_of(content: bytes, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """The latents that `columns_of` wrote. Raises DataError where the bytes do not fill that shape."""
    if dtype not in DTYPES:
        raise DataError(f"latents_dtype must be {', '.join(DTYPES)}; got {dtype!r}.")
    array, count = np.frombuffer(content, dtype=DTYPES[dtype]), int(np.prod(shape))
    if array.size != count:
        raise DataError(f"latents of the shape {tuple(shape)} must hold {count} numbers; got {array.size}.")
    tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="))).reshape(tuple(shape))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


# -- payloads ----------------------------------------------------------------------------------------------------------


def payload_of(images: SampledImages, row: int, *, with_latents: bool) -> dict[str, Any]:
    """The columns of one generated image; `invalid` says why it cannot be trained on, and no latents are kept then."""
    if not images.finite[row]:
        return {**NO_IMAGE, INVALID: "not finite"}
    if images.flagged[row]:
        return {**NO_IMAGE, INVALID: "flagged by the safety checker"}
    image = images.images[row]
    reason, png = why_invalid(image), png_of(image)
    latents = columns_of(images.x0[row]) if with_latents and reason is None else NO_LATENTS
    return {"completion": png, "image_sha256": sha256_of_png(png), INVALID: reason, **latents}


def encode_image(
    adapter: PipelineAdapter, prompt: Prompt, completion: Any, source: str, size: tuple[int, int]
) -> Mapping[str, Any]:
    """The payload of an image of this size (height, width). Raises DataError for any other.

    Its latents are a sample of the VAE's posterior by a generator that the image's own hash seeds.
    """
    if completion is None and source == "teacher":
        return {**NO_IMAGE, INVALID: "the teacher's sample came to nothing"}
    image = read_image(completion, prompt, source)
    if (image.height, image.width) != size:
        height, width = size
        raise DataError(
            f"images must all be of the size that the run draws, {width} x {height}; the one for prompt {prompt.id} "
            f"({source}) is {image.width} x {image.height}. Crop or scale it first, as you want it to be learned, or "
            "set sampling.diffusion.height and .width."
        )
    png = png_of(image)
    name, reason, latents = sha256_of_png(png), why_invalid(image), NO_LATENTS
    if reason is None:
        generator = torch.Generator("cpu").manual_seed(int(name[:15], 16))
        with torch.inference_mode():
            latents = columns_of(adapter.to_latents([image], generator)[0])
    return {"completion": png, "image_sha256": name, INVALID: reason, **latents}


def read_image(completion: Any, prompt: Prompt, source: str) -> Image.Image:
    """The image: from bytes of a file, a PIL image, a path, or `datasets`' mapping of bytes and path."""
    try:
        if isinstance(completion, Image.Image):
            return as_rgb(completion)
        if isinstance(completion, Mapping) and (completion.get("bytes") or completion.get("path")):
            completion = completion.get("bytes") or completion.get("path")
        if isinstance(completion, (bytes, bytearray)):
            return image_of(bytes(completion))
        if isinstance(completion, (str, Path)):
            return image_of(Path(completion).expanduser().read_bytes())
    except OSError as error:
        where = f"{completion!r} (looked for from {Path.cwd()})"
        raise DataError(
            f"an image for prompt {prompt.id} ({source}) must be a file that can be read; {where} is none: "
            f"{error.strerror or error}."
        ) from error
    except DataError as error:
        raise DataError(f"the image for prompt {prompt.id} ({source}): {error}") from error
    raise DataError(
        f"an answer to prompt {prompt.id} ({source}) must be an image: bytes of a PNG or JPEG file, a PIL image, or a "
        f"path; got {completion!r:.80}."
    )
