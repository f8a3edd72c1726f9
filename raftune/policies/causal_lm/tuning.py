"""Fitting to what was kept: rows in, coefficients that make the named objective, and the fit that minimises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from raftune.config.tuning import TuningConfig
from raftune.errors import DataError
from raftune.policies.causal_lm.encoding import Encoder
from raftune.policies.causal_lm.likelihood import Example, Reader, collate
from raftune.policies.normalization import Normalization, coefficients
from raftune.policies.training import Batch, Objective
from raftune.protocols import FloatN
from raftune.records import TOOLS, Prompt

COLUMNS = ["prompt_id", "prompt", "weight", "completion_ids", "finish"]
ROUND = b"raftune.round"


@dataclass(frozen=True)
class Row:
    """A prompt with a completion, and the coefficient of each of its completion tokens in the loss of a step."""

    example: Example
    coefficient: float


@dataclass(frozen=True)
class Rows:
    """What a fit learns from: examples with positive weights, and the round that gathered them."""

    examples: list[Example]
    weights: FloatN
    prompts: list[str]
    round: int
    truncated: int  # rows left out because they were cut off before their end


def read_rows(path: Path, encoder: Encoder, config: TuningConfig) -> Rows:
    """The rows of a Parquet file, on the exact ids that were drawn; prompts stand without the prefix of drawing.

    Raises DataError for rows that cannot be used, and where none is left.
    """
    schema = pq.read_schema(path)
    metadata = schema.metadata or {}
    table = pq.read_table(path, columns=[*COLUMNS, *({TOOLS} & {*schema.names})], use_threads=False)
    columns = table.to_pydict()
    weights = np.array(columns["weight"], dtype=np.float64)
    if (bad := weights[~(np.isfinite(weights) & (weights >= 0))]).size:
        raise DataError(f"Every row's weight must be finite and not negative; got {bad[0]} in {path.name}.")
    cut = np.array([finish == "length" for finish in columns["finish"]], dtype=bool) & config.mask_truncated_completions
    used = np.flatnonzero((weights > 0) & ~cut)
    if not used.size and cut.any():
        raise DataError(
            f"tuning.mask_truncated_completions leaves nothing to learn from: all {int(cut.sum())} kept answers were "
            "cut off. Raise sampling.max_completion_length, or turn it off."
        )
    first_of = {columns["prompt_id"][i]: i for i in reversed(used.tolist())}
    tools = columns.get(TOOLS)
    asked = [
        Prompt(name, columns["prompt"][i], {} if tools is None else {TOOLS: tools[i]}) for name, i in first_of.items()
    ]
    encoded = dict(zip(first_of, encoder.encode(asked, for_drawing=False), strict=True))
    examples = [_example(encoder, columns, i, encoded[columns["prompt_id"][i]]) for i in used.tolist()]
    names = [columns["prompt_id"][i] for i in used]
    return Rows(examples, weights[used], names, int(metadata.get(ROUND, b"0")), int(cut.sum()))


def _example(encoder: Encoder, columns: Mapping[str, Any], row: int, prompt: Sequence[int]) -> Example:
    completion, name = columns["completion_ids"][row], columns["prompt_id"][row]
    if not completion:
        raise DataError(f"Every completion must have at least one token; one to prompt {name} has none. Leave it out.")
    if encoder.context is not None and len(prompt) + len(completion) > encoder.context:
        raise DataError(
            f"Prompt and completion must fit the model's context of {encoder.context} tokens; those of prompt {name} "
            f"have {len(prompt)} and {len(completion)}. Leave the row out, or use a model with a longer context."
        )
    return Example.of(prompt, completion)


def rows_of(found: Rows, normalization: Normalization, step: int) -> list[Row]:
    """The examples with their coefficients."""
    tokens = [example.tokens for example in found.examples]
    shares = coefficients(found.weights, tokens, found.prompts, normalization, step)
    return [Row(example, float(share)) for example, share in zip(found.examples, shares, strict=True)]


def batch_of(rows: Sequence[Row], pad_id: int) -> Batch:
    """A padded batch, with the coefficient of each completion token."""
    repeats = [row.example.tokens for row in rows]
    per_token = np.repeat(np.array([row.coefficient for row in rows], dtype=np.float32), repeats)
    return {**collate([row.example for row in rows], pad_id), "coefficients": torch.from_numpy(per_token)}


def objective(model: Any) -> Objective:
    """The weighted negative log-likelihood of the completions, EOS included; prompts and padding have no part in it."""
    reader = Reader(model)

    def loss(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits_TV = reader.logits(reader.hidden(batch))
        nll_T = F.cross_entropy(logits_TV, batch["targets"], reduction="none")
        weights_T = batch["coefficients"]
        return weights_T @ nll_T, weights_T.sum()

    return loss
