"""A family of images without a network: images generated from six numbers, which a fit moves towards what was kept.

    policy: {family: "tests.runs.image_family:SketchFamily", options: {size: 16}}

The ledger's form of an image, as any family has it: PNG bytes, their hash, why a sample is no image, and latents. A
run of two rounds takes a fraction of a second and imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from raftune.config import RunConfig, validate
from raftune.config.load import merge
from raftune.data.images import image_of, png_of, require_pillow, sha256_of_png, why_invalid
from raftune.errors import DataError
from raftune.protocols import Chunk, TrainReport
from raftune.records import Prompt, Sample
from raftune.runtime.assembly import PythonObjects

Floats = npt.NDArray[np.float64]
COLOURS = ("red", "green", "blue", "yellow", "pink", "grey")
NARROWEST = 0.05  # of the spread that a fit may come to


class SketchFamily:
    """A disc of one colour on another: six numbers z ~ N(mean, std²), shifted by the prompt; a fit takes the winners'.

    options: `size` in pixels; `mean` and `std` of the start, a number each; `broken`, the share of samples that are
    flat,
    and `lost`, of those that are no image at all; `step`, how far a fit goes towards what was kept.
    """

    media = "image"
    payload = pa.schema(
        [
            pa.field("completion", pa.binary()),
            pa.field("image_sha256", pa.string()),
            pa.field("invalid", pa.string()),
            pa.field("latents", pa.binary()),
            pa.field("latents_shape", pa.list_(pa.int32())),
            pa.field("latents_dtype", pa.string()),
        ]
    )

    def __init__(self, options: Mapping[str, Any], folder: Path) -> None:
        self.options, self.folder = options, folder
        self.size, self.step = int(options.get("size", 16)), float(options.get("step", 1.0))
        self.broken, self.lost = float(options.get("broken", 0.0)), float(options.get("lost", 0.0))
        self._law: tuple[Floats, Floats] | None = None

    @classmethod
    def start(cls, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> None:
        options = config.policy.options
        mean, std = (np.full(6, float(options.get(name, default))) for name, default in (("mean", 0.0), ("std", 1.0)))
        save(mean, std, out)

    @classmethod
    def verify(cls, start: Path) -> None: ...

    @classmethod
    def load(cls, config: RunConfig, folder: Path, start: Path) -> SketchFamily:
        return cls(config.policy.options, folder)

    @property
    def law(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the six numbers."""
        if self._law is None:
            found = json.loads((self.folder / "policy.json").read_text())
            self._law = np.array(found["mean"]), np.array(found["std"])
        return self._law

    @property
    def nbytes(self) -> int:
        return 0 if self._law is None else sum(part.nbytes for part in self._law)

    def generate(self, chunk: Chunk) -> list[Sample]:
        mean, std = self.law
        samples = []
        for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True):
            for k, seed in enumerate(seeds):
                generator = np.random.Generator(np.random.Philox(key=seed))
                luck, place = generator.random(), generator.random(2)
                numbers = mean + std * generator.standard_normal(6)
                payload = self.sketched(numbers + shift(prompt.content), place, luck)
                if chunk.scope.endswith("e"):  # an evaluation's: nothing is ever learned from it
                    payload |= {"latents": None, "latents_shape": None, "latents_dtype": None}
                completion, name = payload.pop("completion"), chunk.sample_id(prompt, k)
                samples.append(Sample(name, prompt.id, k, "policy", seed, chunk.version, completion, payload))
        return samples

    def sketched(self, numbers: Floats, place: Floats, luck: float) -> dict[str, Any]:
        """The payload of the image of these numbers, or, by luck, of a flat one or of none."""
        if luck < self.lost:
            return dict.fromkeys(self.payload.names) | {"invalid": "not finite"}
        pixels = sketch(numbers, place, self.size) if luck >= self.lost + self.broken else np.full((4, 4, 3), 99)
        return self.filled(require_pillow().fromarray(pixels.astype(np.uint8)), numbers)

    def filled(self, image: Any, numbers: Floats) -> dict[str, Any]:
        png = png_of(image)
        latents = {"latents": numbers.astype("<f4").tobytes(), "latents_shape": [6, 1, 1], "latents_dtype": "float32"}
        return {"completion": png, "image_sha256": sha256_of_png(png), "invalid": why_invalid(image), **latents}

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        """Somebody's image, its two colours read off: the border's, and the one least like it."""
        image = opened(answer)
        pixels = np.asarray(image, np.float64)
        border = np.median(pixels[0], axis=0)
        disc = pixels.reshape(-1, 3)[np.argmax(np.abs(pixels.reshape(-1, 3) - border).sum(axis=1))]
        share = np.clip(np.concatenate([disc, border]) / 255, 0.01, 0.99)
        return self.filled(image, np.log(share / (1 - share)))

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        """The weighted mean and spread of what was kept, each less its prompt's shift."""
        table = pq.read_table(rows, columns=["prompt", "latents", "weight"], use_threads=False)
        latents, prompts = table.column("latents").to_pylist(), table.column("prompt").to_pylist()
        z = np.stack([np.frombuffer(row, "<f4") - shift(p) for row, p in zip(latents, prompts, strict=True)])
        weights = table.column("weight").to_numpy()
        fitted = np.average(z, axis=0, weights=weights)
        spread = np.sqrt(np.average((z - fitted) ** 2, axis=0, weights=weights))
        mean, std = self.law
        save(mean + self.step * (fitted - mean), np.maximum(std + self.step * (spread - std), NARROWEST), out)
        return TrainReport(rows=len(z), steps=1, losses=(float(((z - mean) ** 2).mean()),))

    def notes(self) -> tuple[str, ...]:
        return ()


def shift(prompt: Any) -> Floats:
    """(6,) in [-0.5, 0.5]: what a prompt adds to the numbers, so that prompts differ."""
    digest = hashlib.sha256(str(prompt).encode()).digest()
    return np.frombuffer(digest[:6], np.uint8) / 255 - 0.5


def sketch(numbers: Floats, place: Floats, size: int) -> Floats:
    """(size, size, 3) in 0 … 255: a disc around `place` (shares of the side) on a background that darkens downwards."""
    colours = 255 / (1 + np.exp(-numbers.reshape(2, 3)))
    y, x = np.mgrid[0:size, 0:size] / size
    inside = (x - 0.25 - place[0] / 2) ** 2 + (y - 0.25 - place[1] / 2) ** 2 < 0.06
    shade = 1 - 0.2 * y[..., None]
    return np.where(inside[..., None], colours[0], colours[1] * shade)


def opened(answer: Any) -> Any:
    """The image that a column holds: bytes, a path, `datasets`' dictionary of both, or a PIL image."""
    if isinstance(answer, Mapping):
        answer = answer.get("bytes") or answer.get("path")
    if isinstance(answer, str | Path):
        answer = Path(answer).read_bytes()
    if isinstance(answer, bytes):
        return image_of(answer)
    if hasattr(answer, "getextrema"):
        return image_of(png_of(answer))
    raise DataError(f"an answer must be an image: bytes, a path or an image; got {type(answer).__name__}.")


def save(mean: Floats, std: Floats, out: Path) -> None:
    (out / "policy.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}) + "\n")


# -- a whole run ------------------------------------------------------------------------------------------------------


def saturation(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    """How colourful each image is: the mean over pixels of the largest less the smallest channel, 0 … 1."""
    return [float(np.ptp(np.asarray(image), axis=2).mean() / 255) for image in completions]


def darkness(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    return [1 - float(np.asarray(image).mean() / 255) for image in completions]


def indifferent(prompts: list[Any], completions: list[Any], **columns: list[Any]) -> list[float]:
    """A number that has nothing to do with how an image looks."""
    return [float(int(hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:8], 16) % 997) for image in completions]


def captions(count: int = 24) -> pa.Table:
    return pa.table({"prompt": [f"a {COLOURS[i % len(COLOURS)]} disc, number {i}" for i in range(count)]})


def config(root: Path, **changes: Any) -> RunConfig:
    """Two rounds of eight prompts, four images of each; `changes` go over it, section by section."""
    base: dict[str, Any] = {
        "output_dir": str(root),
        "num_rounds": 2,
        "report": False,  # the page has tests of its own
        "prompts_per_round": 8,
        "data": {"prompts": "given as an object"},
        "policy": {"family": "tests.runs.image_family:SketchFamily", "options": {"size": 16}},
        "sampling": {"num_generations": 4, "chunk_size": 4},
        "evaluation": {"num_prompts": 6, "num_generations": 4},
        "engine": {"threads": 1},
    }
    return validate(merge([base, changes]))


def objects(*rewards: Any) -> PythonObjects:
    """Twenty-four captions, six held-out ones, and how colourful an image is as its reward."""
    held_out = pa.table({"prompt": [f"a {colour} disc nobody asked for" for colour in COLOURS]})
    return PythonObjects(train=captions, held_out=lambda: held_out, rewards=list(rewards) or [saturation])
