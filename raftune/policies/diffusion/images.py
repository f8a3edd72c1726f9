"""Images as samples and as training rows: payloads, and clean latents as Parquet columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from raftune.data.images import as_rgb, image_of, png_of, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.policies.diffusion.pipelines.base import PipelineAdapter, SampledImages
from raftune.records import INVALID, LATENTS, Prompt
from raftune.training.fit import Batch
from raftune.training.objectives import Normalization, coefficients

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


# -- training rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageRow:
    """One image: its number in the fit, the number of its distinct prompt, its coefficient in a step's loss, and its
    clean latents (C, h, w) in the dtype in which they were saved."""

    number: int
    prompt: int
    coefficient: float
    x0: torch.Tensor


@dataclass(frozen=True)
class ImageRows:
    """The images of positive weight, their distinct prompts, and the round that gathered them."""

    rows: list[ImageRow]
    prompts: list[Prompt]
    round: int


def read_rows(path: Path, shape: tuple[int, int, int], normalization: Normalization, step: int) -> ImageRows:
    """The rows of a Parquet file whose latents have this (C, h, w), for a fit whose steps have `step` rows.

    Raises DataError for one that cannot be used.
    """
    columns = ["sample_id", "prompt_id", "prompt", "weight", INVALID, *(field.name for field in FIELDS)]
    table = pq.read_table(path, columns=columns, use_threads=False)
    weights = np.asarray(table.column("weight").to_numpy(), dtype=np.float64)
    if (bad := weights[~(np.isfinite(weights) & (weights >= 0))]).size:
        raise DataError(f"Every row's weight must be finite and not negative; got {bad[0]} in {path.name}.")
    used = table.filter(pa.array(weights > 0))
    ids, contents = used.column("prompt_id").to_pylist(), used.column("prompt").to_pylist()
    first: dict[str, int] = {}
    numbers = [first.setdefault(repr(content), len(first)) for content in contents]
    prompts = {number: Prompt(name, content) for number, name, content in zip(numbers, ids, contents, strict=True)}
    latents = [_latents(row, shape) for row in used.drop_columns(["prompt"]).to_pylist()]
    elements = [int(np.prod(shape))] * len(latents)
    # By prompt id, not by text: equal texts asked twice are two prompts.
    shares = coefficients(weights[weights > 0], elements, ids, normalization, step).tolist()
    rows = list(map(ImageRow, range(len(latents)), numbers, shares, latents))
    round_ = int((pq.read_schema(path).metadata or {}).get(b"raftune.round", b"0"))
    return ImageRows(rows, list(prompts.values()), round_)


def _latents(row: dict[str, Any], shape: tuple[int, int, int]) -> torch.Tensor:
    """The latents of one row. Raises DataError where there are none, of another shape, or not finite."""
    name = row["sample_id"]
    content, actual, dtype = (row[field.name] for field in FIELDS)
    if content is None or actual is None or dtype is None:
        reason = f" ({row[INVALID]})" if row[INVALID] else ""
        raise DataError(
            f"Every row must have latents to learn from; {name} has none{reason}. "
            "Take a reference image out of its data set; draw a round's again with `raftune train … --from generate`."
        )
    if tuple(actual) != shape:
        raise DataError(
            f"Latents must have the shape {shape} of this run's images; those of {name} have {tuple(actual)}. It was "
            "generated at another height or width: draw its round again with `raftune train … --from generate`, or set "
            "sampling.diffusion.height and width to its own."
        )
    try:
        x0 = latents_of(content, actual, dtype)
    except DataError as error:
        raise DataError(f"{name}: {error} Draw its round again with `raftune train … --from generate`.") from error
    if not bool(torch.isfinite(x0.float()).all()):
        raise DataError(f"Latents must be finite; those of {name} hold a NaN or an infinity. Leave the row out.")
    return x0


def batch_of(rows: Sequence[ImageRow]) -> Batch:
    """x0 (N, C, h, w) float32, and of each row its number, its prompt and its coefficient."""
    return {
        "x0": torch.stack([row.x0.float() for row in rows]),
        "rows": torch.tensor([row.number for row in rows]),
        "prompts": torch.tensor([row.prompt for row in rows]),
        "coefficients": torch.tensor([row.coefficient for row in rows], dtype=torch.float32),
    }
