"""Generates images, and puts them into columns: a PNG, and clean latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from raftune.data.images import as_rgb, image_of, png_of, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.policies.diffusion.pipelines.base import Conditions, PipelineAdapter, PipelineCall, SampledImages
from raftune.records import INVALID, LATENTS, Prompt
from raftune.store import partial
from raftune.training.devices import names_out_of_memory
from raftune.training.quiet import quiet

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
            f"images must all be of the size that the run generates, {width} x {height}; the one for prompt "
            f"{prompt.id} ({source}) is {image.width} x {image.height}. Crop or scale it first, as you want it to be "
            "learned, or set sampling.diffusion.height and .width."
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
        shown = f"{completion!r} (looked for from {Path.cwd()})"
        raise DataError(
            f"an image for prompt {prompt.id} ({source}) must be a file that can be read; {shown} is none: "
            f"{error.strerror or error}."
        ) from error
    except DataError as error:
        raise DataError(f"the image for prompt {prompt.id} ({source}): {error}") from error
    raise DataError(
        f"a completion to prompt {prompt.id} ({source}) must be an image: bytes of a PNG or JPEG file, a PIL image, or "
        f"a path; got {completion!r:.80}."
    )


# -- generating --------------------------------------------------------------------------------------------------------


def generate(
    bound: Callable[[], PipelineAdapter],
    conditions: Conditions,
    negative: Conditions | None,
    seeds: Sequence[int],
    call: PipelineCall,
    batch_size: int,
    device: torch.device,
    *,
    with_latents: bool,
) -> list[dict[str, Any]]:
    """The payload of each image: row i is for conditions' row i, its noise generated from seeds[i] alone.

    Each is what the pipeline gives for that prompt and a CPU generator of that seed, up to the rounding of batches.
    `bound` returns the pipeline with a scheduler of its own, as several batches run at once on a CPU; `batch_size`
    counts the rows of all of them. Raises OutOfMemory with it.
    """
    away = None if negative is None else negative.to(device)
    at_once = parallel_for(bound(), call, device, min(batch_size, len(seeds)))

    def generated(rows: list[int]) -> list[dict[str, Any]]:
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in rows]
        with names_out_of_memory(batch_size, "sampling.diffusion.height and width"), torch.inference_mode():
            images = bound().sample(conditions.take(rows).to(device), away, generators, call)
        return [payload_of(images, row, with_latents=with_latents) for row in range(len(rows))]

    payloads: list[dict[str, Any]] = []

    def save(path: Path) -> None:
        pq.write_table(pa.Table.from_pylist(payloads, schema=PAYLOAD), path, compression="none")

    def size() -> int:
        return sum(len(value) for payload in payloads for value in payload.values() if isinstance(value, bytes))

    all_batches = batches(len(seeds), batch_size, at_once)
    with quiet(), partial.current("images").work() as part, parallel(at_once) as parallel_map:
        if (saved := part.find()) is not None:  # by an earlier attempt
            payloads.extend(pq.read_table(saved, use_threads=False).to_pylist())
        remaining = [rows for rows in all_batches if rows[0] >= len(payloads)]
        for first in range(0, len(remaining), at_once):
            payloads.extend(
                payload for batch in parallel_map(generated, remaining[first : first + at_once]) for payload in batch
            )
            part.step(save, size, done=(len(payloads), len(seeds), "images"))
    return payloads


def parallel_for(adapter: PipelineAdapter, call: PipelineCall, device: torch.device, rows: int) -> int:
    """How many batches run at once: one on an accelerator, as many as torch has threads on a CPU.

    One, too, where the networks change while they are used: a scale of adapters in the call, which peft writes into the
    weights, or a VAE that is converted while it decodes.
    """
    scaled = any(name.endswith("attention_kwargs") for name in call.kwargs)
    if device.type != "cpu" or scaled or adapter.overflows:
        return 1
    return max(1, min(torch.get_num_threads(), rows))


def batches(count: int, batch_size: int, at_once: int) -> list[list[int]]:
    """The rows 0…count-1 in consecutive batches of similar size, of which `at_once` have at most batch_size rows."""
    parts = np.array_split(np.arange(count), math.ceil(count / batch_size) * at_once)
    return [part.tolist() for part in parts if len(part)]


@contextmanager
def parallel(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` that makes `count` calls at once, each with a share of torch's threads; results come in order, and the
    first failure ends all of them.

    Two batches of a small denoiser are faster in parallel on one core each than in sequence on two
    (docs/decisions/0025).
    """
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        share = max(1, threads // count)
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # a later thread takes the number that was set last, by any thread
