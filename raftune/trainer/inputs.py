"""Converts a trainer's rewards and prompts to specs, objects and tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.data.tables import table_from
from raftune.errors import ConfigError, DataError
from raftune.rewards.loading import load_reward
from raftune.rewards.resolve import FunctionReward
from raftune.store.files import sha256_hex


@dataclass(frozen=True)
class RewardInputs:
    """Rewards by name, for the section `rewards`, and those that are objects of this process with their weights."""

    specs: list[dict[str, Any]] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def reward_inputs(rewards: Any, tokenizers: Any, weights: Sequence[float] | None) -> RewardInputs:
    """The rewards in their two kinds. Raises ConfigError without a reward, and for lists of other lengths."""
    if not isinstance(rewards, (list, tuple)):
        rewards = [] if rewards is None else [rewards]
    if not rewards:
        raise ConfigError(
            "reward_funcs must hold at least one reward; got none. Give a function that returns a list of numbers."
        )
    if tokenizers is None:
        tokenizers = [None] * len(rewards)
    elif not isinstance(tokenizers, (list, tuple)):  # as in TRL: one tokenizer belongs to one reward
        tokenizers = [tokenizers]
    weights = [1.0] * len(rewards) if weights is None else weights
    for name, values in (("reward_processing_classes", tokenizers), ("reward_weights", weights)):
        if len(values) != len(rewards):
            raise ConfigError(
                f"{name} must hold one entry for each reward; got {len(values)} for {len(rewards)} rewards. Give a "
                "list, with None where a reward needs none."
            )
    inputs = RewardInputs()
    for number, (reward, tokenizer, weight) in enumerate(zip(rewards, tokenizers, weights, strict=True)):
        if isinstance(reward, (str, Path)) and tokenizer is None:
            inputs.specs.append({"spec": str(reward), "weight": float(weight)})
            continue
        inputs.weights.append(float(weight))
        if isinstance(reward, (str, Path)):
            from raftune.rewards.builtin.classifier import ClassifierReward

            inputs.objects.append(ClassifierReward(model=str(reward)).load(tokenizer=tokenizer))
        elif getattr(reward, "__name__", None) == "<lambda>":  # TRL numbers functions without a name
            inputs.objects.append(FunctionReward(reward, f"reward_{number}"))
        else:
            inputs.objects.append(load_reward(reward, tokenizer=tokenizer))
    return inputs


@dataclass(frozen=True)
class PromptInputs:
    """The configuration of a data set, and its table if it was given as an object."""

    source: str
    table: Callable[[], pa.Table] | None = None


def prompt_inputs(
    rows: Any,
    name: str,
    columns: Callable[[str], bool] | None = None,
    needed: int | None = None,
    hashed: int | None = None,
) -> PromptInputs:
    """The prompts: a file or name, or rows identified by their hash. Raises DataError for anything else.

    Of a stream no more than `needed` rows are read, and the hash is of the first `hashed`, so that a run of more rounds
    is the same run. `columns` says which columns are kept.
    """
    if rows is None:
        raise ConfigError(f"{name} must be given; got None. Give rows with a 'prompt' column.")
    if isinstance(rows, (str, Path)):
        return PromptInputs(str(rows))
    if isinstance(rows, Mapping):
        raise DataError(
            f"{name} must be one data set; got a dictionary of {', '.join(map(str, rows))}. Choose one: {name}=data[…]."
        )
    stream = isinstance(rows, Iterable) and not hasattr(rows, "__len__")
    try:
        table = table_from(list(itertools.islice(rows, needed)) if stream else rows)
    except DataError as error:
        raise DataError(str(error).replace("train_dataset", name)) from error
    if columns is not None:
        table = table.select([column for column in table.column_names if columns(column)])
    identity = f"stream-{table_hash(table.slice(0, hashed))}" if stream else table_hash(table)
    return PromptInputs(f"object:{identity}", lambda: table)


def held_out_inputs(rows: Any, columns: Callable[[str], bool] | None, count: int) -> PromptInputs:
    """The held-out prompts; of a dictionary of data sets equally many of each: rounds are compared by all of them."""
    if not isinstance(rows, Mapping) or not rows:
        return prompt_inputs(rows, "eval_dataset", columns, count)
    share = max(1, -(-count // len(rows)))
    together: list[dict[str, Any]] = []
    for name, part in rows.items():
        table = prompt_inputs(part, f"eval_dataset[{name!r}]", columns, share).table
        if table is None:
            raise DataError(f"eval_dataset[{name!r}] must be a data set; got {part!r}. Load it first.")
        together += table().slice(0, share).to_pylist()
    return prompt_inputs(together, "eval_dataset")


def table_hash(table: pa.Table) -> str:
    """16 hex digits over the rows, whatever chunks and metadata they come in."""
    rows = (row for batch in table.to_batches(max_chunksize=1000) for row in batch.to_pylist())
    texts = (json.dumps(row, sort_keys=True, default=repr) for row in rows)
    return sha256_hex(itertools.chain([json.dumps(table.column_names)], texts))[:16]
