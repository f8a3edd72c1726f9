"""Converts a trainer's rewards and prompts to specs, objects and tables."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.data.tables import table_from
from raftune.errors import ConfigError, DataError
from raftune.rewards.function import FunctionReward
from raftune.rewards.loading import load_reward

_BATCH = 1000


@dataclass(frozen=True)
class RewardInputs:
    """Rewards by name, for the section `rewards`, and those that are objects of this process with their weights."""

    specs: list[dict[str, Any]] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def given_rewards(rewards: Any, tokenizers: Any, weights: Sequence[float] | None) -> RewardInputs:
    """The rewards in their two kinds. Raises ConfigError where none is given, or lists do not match."""
    several = list(rewards) if isinstance(rewards, (list, tuple)) else [] if rewards is None else [rewards]
    if not several:
        raise ConfigError(
            "reward_funcs must hold at least one reward; got none. Give a function that returns a list of numbers."
        )
    if isinstance(tokenizers, (list, tuple)):
        beside = list(tokenizers)
    else:  # as in TRL: one that is given belongs to one reward
        beside = [None] * len(several) if tokenizers is None else [tokenizers]
    factors = [1.0] * len(several) if weights is None else list(weights)
    for name, one in (("reward_processing_classes", beside), ("reward_weights", factors)):
        if len(one) != len(several):
            raise ConfigError(
                f"{name} must hold one entry for each reward; got {len(one)} for {len(several)} rewards. Give a list, "
                "with None where a reward needs none."
            )
    found = RewardInputs()
    for number, (reward, tokenizer, weight) in enumerate(zip(several, beside, factors, strict=True)):
        if isinstance(reward, (str, Path)) and tokenizer is None:
            found.specs.append({"spec": str(reward), "weight": float(weight)})
        else:
            found.objects.append(_as_object(reward, tokenizer, number))
            found.weights.append(float(weight))
    return found


def _as_object(reward: Any, tokenizer: Any, number: int) -> Any:
    if isinstance(reward, (str, Path)):
        from raftune.rewards.builtin.classifier import ClassifierReward
        from raftune.rewards.builtin.model_options import ClassifierOptions

        return ClassifierReward(ClassifierOptions(model=str(reward)), tokenizer=tokenizer)
    if getattr(reward, "__name__", None) == "<lambda>":  # TRL counts what has no name
        return FunctionReward(reward, f"reward_{number}")
    return load_reward(reward, tokenizer=tokenizer)


@dataclass(frozen=True)
class PromptInputs:
    """The configuration of a data set, and its table if it was given as an object."""

    source: str
    table: Callable[[], pa.Table] | None = None


def given_prompts(
    rows: Any,
    name: str,
    columns: Callable[[str], bool] | None = None,
    needed: int | None = None,
    known_by: int | None = None,
) -> PromptInputs:
    """The prompts: a file or name, or rows known by their hash. Raises DataError for what is no data set of prompts.

    Of a stream no more than `needed` rows are read, and it is known by the first `known_by` of them, so that a run of
    more rounds is the same run. `columns` says which columns are kept.
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
    known = f"stream-{table_hash(table.slice(0, known_by))}" if stream else table_hash(table)
    return PromptInputs(f"object:{known}", lambda: table)


def given_held_out(rows: Any, columns: Callable[[str], bool] | None, wanted: int) -> PromptInputs:
    """The held-out prompts; of a dictionary of data sets as many of each: rounds are compared by all of them."""
    if not isinstance(rows, Mapping) or not rows:
        return given_prompts(rows, "eval_dataset", columns, wanted)
    share = max(1, -(-wanted // len(rows)))
    together: list[dict[str, Any]] = []
    for name, part in rows.items():
        table = given_prompts(part, f"eval_dataset[{name!r}]", columns, share).table
        if table is None:
            raise DataError(f"eval_dataset[{name!r}] must be a data set; got {part!r}. Load it first.")
        together += table().slice(0, share).to_pylist()
    return given_prompts(together, "eval_dataset")


def table_hash(table: pa.Table) -> str:
    """16 hex digits over the rows, whatever chunks and metadata they come in."""
    total = hashlib.sha256(json.dumps(table.column_names).encode())
    for batch in table.to_batches(max_chunksize=_BATCH):
        for row in batch.to_pylist():
            total.update(json.dumps(row, sort_keys=True, default=repr).encode())
    return total.hexdigest()[:16]
