"""Training of a language model on the kept rows: inputs, loss coefficients, and the loss."""

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
from raftune.training.objectives import coefficients, read_weighted

COLUMNS = ["prompt_id", "prompt", "completion_ids", "finish"]


@dataclass(frozen=True)
class TrainingRow:
    """A prompt with a completion, and the coefficient of each of its completion tokens in the loss of a step."""

    example: TokenizedCompletion
    coefficient: float
    extra: Mapping[str, float] = field(default_factory=dict)  # columns that a custom objective added


@dataclass(frozen=True)
class TrainingRows:
    """The rows of positive weight, and the round that gathered them."""

    rows: list[TrainingRow]
    round: int
    truncated: int  # rows left out because they were cut off before their end

    @property
    def examples(self) -> list[TokenizedCompletion]:
        return [row.example for row in self.rows]


def read_rows(path: Path, encoder: TextEncoder, config: TrainingConfig) -> TrainingRows:
    """The rows of a Parquet file, on the exact ids that were generated; prompts stand without the prefix of generating.

    Raises DataError for rows that cannot be used, and where none is left.
    """
    schema = pq.read_schema(path)
    table, weights, round_ = read_weighted(path, [*COLUMNS, *({TOOLS} & {*schema.names})])
    columns = table.to_pydict()
    cut = np.array([finish == "length" for finish in columns["finish"]], dtype=bool) & config.mask_truncated_completions
    used = np.flatnonzero((weights > 0) & ~cut)
    if not used.size and cut.any():
        raise DataError(
            f"training.mask_truncated_completions leaves nothing to learn from: all {int(cut.sum())} kept completions "
            "were cut off. Raise sampling.max_completion_length, or turn it off."
        )
    names = [columns["prompt_id"][i] for i in used]
    prompts = {
        columns["prompt_id"][i]: Prompt(
            columns["prompt_id"][i], columns["prompt"][i], {TOOLS: columns[TOOLS][i]} if TOOLS in columns else {}
        )
        for i in reversed(used.tolist())
    }
    encoded = dict(zip(prompts, encoder.encode([*prompts.values()], for_drawing=False), strict=True))
    examples = []
    for i in used.tolist():
        completion, name = columns["completion_ids"][i], columns["prompt_id"][i]
        if not completion:
            raise DataError(
                f"Every completion must have at least one token; one to prompt {name} has none. Leave it out."
            )
        if encoder.context is not None and len(encoded[name]) + len(completion) > encoder.context:
            raise DataError(
                f"Prompt and completion must fit the model's context of {encoder.context} tokens; those of prompt "
                f"{name} have {len(encoded[name])} and {len(completion)}. Leave the row out, or use a model with a "
                "longer context."
            )
        examples.append(TokenizedCompletion.of(encoded[name], completion))
    extra: dict[str, FloatArray] = {}
    standard = {*COLUMNS, TOOLS, "weight", "sample_id", "origin", "source"}
    for column in schema:  # numbers that a custom objective added
        if column.name in standard or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            continue
        values = pq.read_table(path, columns=[column.name]).column(column.name).to_numpy()
        extra[column.name] = np.asarray(values, np.float64)[used]
        if not np.isfinite(extra[column.name]).all():
            raise DataError(
                f"training.objective: every row must have a number in the column {column.name!r} that `rows` adds; "
                "rows of training.reference, and of rounds with another objective, have none. Leave out reference and "
                "replay_rounds."
            )
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = [example.tokens for example in examples]
    shares = coefficients(weights[used], tokens, names, config.loss_normalization, step).tolist()
    rows = [
        TrainingRow(example, share, {name: float(column[i]) for name, column in extra.items()})
        for i, (example, share) in enumerate(zip(examples, shares, strict=True))
    ]
    return TrainingRows(rows, round_, int(cut.sum()))


def batch_of(rows: Sequence[TrainingRow], pad_id: int) -> Batch:
    """A padded batch; for each completion token its row in the batch, its coefficient, and the row's added columns."""
    repeats = [row.example.tokens for row in rows]

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), repeats))

    added = {name: per_token([row.extra[name] for row in rows]) for name in rows[0].extra}
    owner = torch.from_numpy(np.repeat(np.arange(len(rows)), repeats))
    shares = per_token([row.coefficient for row in rows])
    return {**added, **collate([row.example for row in rows], pad_id), "coefficients": shares, "row": owner}


class LearnedLM:
    """A causal LM as an objective sees it: the completions' tokens, EOS included; prompts and padding have no part."""

    def __init__(self, module: Any) -> None:
        self.module, self._reader = module, CompletionLogits(module)

    def token_log_probs(self, batch: Batch) -> torch.Tensor:
        """(T,) nats of each completion token of the batch, with gradient."""
        return -F.cross_entropy(self._reader.logits(self._reader.hidden(batch)), batch["targets"], reduction="none")

    def terms(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T,) the negative log-likelihood of each completion token, (T,) its coefficient, and their sum."""
        return -self.token_log_probs(batch), batch["coefficients"], batch["coefficients"].sum()


def loss_of(objective: Objective, name: str) -> Callable[[Any], Loss]:
    """The objective as a function from a model to the loss of a batch, as `fit` takes it."""

    def bind(module: Any) -> Loss:
        model = LearnedLM(module)
        return checked_loss(lambda batch: objective.loss(model, batch), name)

    return bind
