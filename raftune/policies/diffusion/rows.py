"""Training rows of a denoiser: clean latents with prompt and weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raftune.arrays import FloatArray
from raftune.errors import DataError
from raftune.policies.diffusion.latents import FIELDS, latents_of
from raftune.records import INVALID, Prompt
from raftune.training.fit import Batch
from raftune.training.loss_weights import Normalization, coefficients

LEARNED = ["sample_id", INVALID, *(field.name for field in FIELDS)]
COLUMNS = ["prompt_id", "prompt", "weight", *LEARNED]
ROUND = b"raftune.round"


@dataclass(frozen=True)
class ImageRow:
    """One image: its number in the fit, which of the distinct prompts it answers, its coefficient in a step's loss."""

    number: int
    prompt: int
    coefficient: float
    latents: tuple[bytes, Sequence[int], str]

    @property
    def x0(self) -> torch.Tensor:
        """(C, h, w) float32."""
        return latents_of(*self.latents).float()


@dataclass(frozen=True)
class ImageRows:
    """The images of positive weight, the distinct prompts that they answer, and the round that gathered them.

    `which[i]` is the prompt of image i; `names[i]` its id: equal texts that were asked twice are two prompts.
    """

    latents: list[tuple[bytes, Sequence[int], str]]
    weights: FloatArray
    prompts: list[Prompt]
    which: list[int]
    names: list[str]
    round: int

    def __len__(self) -> int:
        return len(self.latents)

    def with_coefficients(self, normalization: Normalization, step: int) -> list[ImageRow]:
        """The rows of a fit whose steps have `step` of them."""
        elements = [int(np.prod(shape)) for _, shape, _ in self.latents]
        shares = coefficients(self.weights, elements, self.names, normalization, step)
        return [
            ImageRow(i, self.which[i], float(share), latents)
            for i, (share, latents) in enumerate(zip(shares, self.latents, strict=True))
        ]


def read_rows(path: Path, shape: tuple[int, int, int]) -> ImageRows:
    """The rows of a Parquet file whose latents have this (C, h, w). Raises DataError for one that cannot be used."""
    table = pq.read_table(path, columns=COLUMNS, use_threads=False)
    weights = np.asarray(table.column("weight").to_numpy(), dtype=np.float64)
    if (bad := weights[~(np.isfinite(weights) & (weights >= 0))]).size:
        raise DataError(f"Every row's weight must be finite and not negative; got {bad[0]} in {path.name}.")
    used = table.filter(pa.array(weights > 0))
    ids, contents = used.column("prompt_id").to_pylist(), used.column("prompt").to_pylist()
    first: dict[str, int] = {}
    which = [first.setdefault(repr(content), len(first)) for content in contents]
    prompts = {number: Prompt(name, content) for number, name, content in zip(which, ids, contents, strict=True)}
    latents = [_checked(row, shape) for row in used.select(LEARNED).to_pylist()]
    round_ = int((pq.read_schema(path).metadata or {}).get(ROUND, b"0"))
    return ImageRows(latents, weights[weights > 0], [prompts[i] for i in range(len(first))], which, ids, round_)


def _checked(row: dict[str, Any], shape: tuple[int, int, int]) -> tuple[bytes, Sequence[int], str]:
    """The latents of one row. Raises DataError where there are none, of another shape, or not finite."""
    name = row["sample_id"]
    content, found, dtype = (row[field.name] for field in FIELDS)
    if content is None or found is None or dtype is None:
        why = f" ({row[INVALID]})" if row[INVALID] else ""
        raise DataError(
            f"Every row must have latents to learn from; {name} has none{why}. "
            "Take a reference image out of its data set; draw a round's again with `raftune train … --from generate`."
        )
    if tuple(found) != shape:
        raise DataError(
            f"Latents must have the shape {shape} of this run's images; those of {name} have {tuple(found)}. It was "
            "generated at another height or width: draw its round again with `raftune train … --from generate`, or set "
            "sampling.diffusion.height and width to its own."
        )
    try:
        finite = bool(torch.isfinite(latents_of(content, found, dtype).float()).all())
    except DataError as error:
        raise DataError(f"{name}: {error} Draw its round again with `raftune train … --from generate`.") from error
    if not finite:
        raise DataError(f"Latents must be finite; those of {name} hold a NaN or an infinity. Leave the row out.")
    return content, found, dtype


def batch_of(rows: Sequence[ImageRow]) -> Batch:
    """x0 (N, C, h, w) float32, and of each row its number, its prompt and its coefficient."""
    return {
        "x0": torch.stack([row.x0 for row in rows]),
        "rows": torch.tensor([row.number for row in rows]),
        "prompts": torch.tensor([row.prompt for row in rows]),
        "coefficients": torch.tensor([row.coefficient for row in rows], dtype=torch.float32),
    }
