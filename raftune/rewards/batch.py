"""Input and output of a reward call, in TRL's form."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from raftune.records import json_text

RESERVED = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """Samples side by side: every list has one entry a sample. `state` holds fields of `trainer_state`.

    Prompts are texts and completions texts, or prompts are message lists and completions
    `[{"role": "assistant", "content": …}]`; where the policy makes images, completions are RGB images of Pillow.
    """

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    completion_ids: list[list[int]] | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def take(self, indices: Sequence[int]) -> RewardBatch:
        """The samples at these indices, in this order."""
        ids = None if self.completion_ids is None else [self.completion_ids[i] for i in indices]
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        prompts, completions = [self.prompts[i] for i in indices], [self.completions[i] for i in indices]
        return RewardBatch(prompts, completions, columns, ids, self.state)


@dataclass
class TrainerState:
    """What a reward may read of `trainer_state`: the fields that scripts for TRL use to shape rewards over time."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    is_world_process_zero: bool = True
    log_history: list[dict[str, Any]] = field(default_factory=list)


class RewardLog:
    """What one call handed to `log_metric` and `log_extra`."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(_name(name), []).append(float(value))

    def extra(self, column: str, values: list[Any]) -> None:
        self.columns.setdefault(_name(column), []).extend(_plain(value) for value in values)


def _name(name: Any) -> str:
    """A reward may log under any name: one that is no text must not end the run."""
    return str(name).encode("utf-8", "replace").decode()


def _plain(value: Any) -> Any:
    """What JSON holds of the value, so that every place where a reward runs logs the same."""
    if value is None or type(value) in (bool, int, float):
        return value
    return json.loads(json_text(value))


def keywords(batch: RewardBatch, log: RewardLog) -> dict[str, Any]:
    """Everything that the contract passes by keyword; the lists are copies, so that no reward can change another's.

    Images are not: a person's own callable gets copies of them (FunctionReward), and our own rewards change none.
    """
    columns = {name: _own(values) for name, values in batch.columns.items() if name not in RESERVED}
    state = TrainerState()
    for name, value in batch.state.items():
        setattr(state, name, value)
    return {
        **columns,
        "prompts": _own(batch.prompts),
        "completions": _own(batch.completions),
        "completion_ids": None if batch.completion_ids is None else [list(ids) for ids in batch.completion_ids],
        "trainer_state": state,
        "log_extra": log.extra,
        "log_metric": log.metric,
    }


def _own(values: list[Any]) -> list[Any]:
    return [copy.deepcopy(value) if isinstance(value, list | dict) else value for value in values]
