"""SFT of a language model on the kept rows: inputs, loss coefficients and the training call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional as F

from raftune.arrays import FloatArray
from raftune.config.training import TrainingConfig
from raftune.errors import DataError
from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, collate
from raftune.protocols import Objective
from raftune.records import TOOLS, Prompt
from raftune.training.fit import Batch, Loss, checked_loss
from raftune.training.objectives import Normalization, coefficients

COLUMNS = ["prompt_id", "prompt", "weight", "completion_ids", "finish"]
ROUND = b"raftune.round"


@dataclass(frozen=True)
class TrainingRow:
    """A prompt with a completion, and the coefficient of each of its completion tokens in the loss of a step."""

    example: TokenizedCompletion
    coefficient: float
    extra: Mapping[str, float] = field(default_factory=dict)  # what a custom objective added to the row


@dataclass(frozen=True)
class TrainingRows:
    """What a fit learns from: examples with positive weights, and the round that gathered them."""

    examples: list[TokenizedCompletion]
    weights: FloatArray
    prompts: list[str]
    round: int
    truncated: int  # rows left out because they were cut off before their end
    extra: Mapping[str, FloatArray] = field(default_factory=dict)  # by name, columns that an objective added, (N,)


def read_rows(path: Path, encoder: TextEncoder, config: TrainingConfig) -> TrainingRows:
    """The rows of a Parquet file, on the exact ids that were generated; prompts stand without the prefix of generating.

    Raises DataError for rows that cannot be used, and where none is left.
    """
    schema = pq.read_schema(path)
    metadata = schema.metadata or {}
    table = pq.read_table(path, columns=[*COLUMNS, *({TOOLS} & {*schema.names})], use_threads=False)
    columns = table.to_pydict()
    extra = {name: pq.read_table(path, columns=[name]).column(name).to_numpy() for name in _added(schema)}
    weights = np.array(columns["weight"], dtype=np.float64)
    if (bad := weights[~(np.isfinite(weights) & (weights >= 0))]).size:
        raise DataError(f"Every row's weight must be finite and not negative; got {bad[0]} in {path.name}.")
    cut = np.array([finish == "length" for finish in columns["finish"]], dtype=bool) & config.mask_truncated_completions
    used = np.flatnonzero((weights > 0) & ~cut)
    if not used.size and cut.any():
        raise DataError(
            f"training.mask_truncated_completions leaves nothing to learn from: all {int(cut.sum())} kept answers were "
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
    added = {name: np.asarray(column, np.float64)[used] for name, column in extra.items()}
    if lacking := [name for name, column in added.items() if not np.isfinite(column).all()]:
        raise DataError(
            f"training.objective: every row must have a number in the column {lacking[0]!r} that `rows` adds; rows of "
            "training.reference, and of rounds with another objective, have none. Leave out reference and "
            "replay_rounds."
        )
    return TrainingRows(examples, weights[used], names, int(metadata.get(ROUND, b"0")), int(cut.sum()), added)


def _added(schema: pa.Schema) -> list[str]:
    """The columns of numbers that a custom objective added."""
    own = {*COLUMNS, TOOLS, "sample_id", "origin", "source"}
    numeric = (pa.types.is_floating, pa.types.is_integer)
    return [column.name for column in schema if column.name not in own and any(is_(column.type) for is_ in numeric)]


def _example(encoder: TextEncoder, columns: Mapping[str, Any], row: int, prompt: Sequence[int]) -> TokenizedCompletion:
    completion, name = columns["completion_ids"][row], columns["prompt_id"][row]
    if not completion:
        raise DataError(f"Every completion must have at least one token; one to prompt {name} has none. Leave it out.")
    if encoder.context is not None and len(prompt) + len(completion) > encoder.context:
        raise DataError(
            f"Prompt and completion must fit the model's context of {encoder.context} tokens; those of prompt {name} "
            f"have {len(prompt)} and {len(completion)}. Leave the row out, or use a model with a longer context."
        )
    return TokenizedCompletion.of(prompt, completion)


def rows_of(found: TrainingRows, normalization: Normalization, step: int) -> list[TrainingRow]:
    """The examples with their coefficients."""
    tokens = [example.tokens for example in found.examples]
    shares = coefficients(found.weights, tokens, found.prompts, normalization, step)
    extra = [{name: float(column[i]) for name, column in found.extra.items()} for i in range(len(tokens))]
    return [TrainingRow(*parts) for parts in zip(found.examples, shares.tolist(), extra, strict=True)]


def batch_of(rows: Sequence[TrainingRow], pad_id: int) -> Batch:
    """A padded batch; for each completion token its row in the batch and its coefficient, and what the row has more."""
    repeats = [row.example.tokens for row in rows]

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), repeats))

    added = {name: per_token([row.extra[name] for row in rows]) for name in rows[0].extra}
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), repeats))
    coefficients = per_token([row.coefficient for row in rows])
    return {**added, **collate([row.example for row in rows], pad_id), "coefficients": coefficients, "row": owner}


class LearnedLM:
    """A causal LM as an objective sees it: the completions' tokens, EOS included; prompts and padding have no part."""

    def __init__(self, module: Any) -> None:
        self.module, self._reader = module, CompletionLogits(module)

    def token_log_probs(self, batch: Batch) -> torch.Tensor:
        """(T,) nats of each completion token of the batch, with gradient."""
        return -F.cross_entropy(self._reader.logits(self._reader.hidden(batch)), batch["targets"], reduction="none")

    def terms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T,) the negative log-likelihood of each completion token, (T,) its coefficient, and their sum."""
        nll_T = F.cross_entropy(self._reader.logits(self._reader.hidden(batch)), batch["targets"], reduction="none")
        return nll_T, batch["coefficients"], batch["coefficients"].sum()


def loss_of(objective: Objective, name: str) -> Callable[[Any], Loss]:
    """The objective as a fit calls it: for a model, the loss of a batch."""

    def bind(module: Any) -> Loss:
        model = LearnedLM(module)
        return checked_loss(lambda batch: objective.loss(model, batch), name)

    return bind
