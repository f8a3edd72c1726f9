"""Preferences and ratings that a tiny model learns in seconds, as files."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raftune.config.load import validate_as
from raftune.config.reward_model import RewardModelConfig
from raftune.protocols import Callback
from raftune.reward_models.training import RewardTrainingOutcome, train_reward_model
from raftune.rewards import load_reward

Row = dict[str, Any]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def letters(rng: random.Random, mark: str, length: int = 8) -> str:
    return "".join(rng.sample([*rng.choices("abcdefgh", k=length), mark], length + 1))


def marked(n: int = 240, *, as_messages: bool = False) -> list[Row]:
    """Pairs of equal length of which the preferred answer has a plus somewhere, and the other a minus."""
    rng = random.Random(0)
    rows: list[Row] = [
        {"prompt": f"Q{i} ", "chosen": letters(rng, "+"), "rejected": letters(rng, "-")} for i in range(n)
    ]
    return [conversational(row) for row in rows] if as_messages else rows


def conversational(row: Row) -> Row:
    told = {"prompt": [{"role": "user", "content": row["prompt"]}]}
    return told | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}


def tossed(n: int = 240) -> list[Row]:
    """Pairs whose labels are a coin's."""
    rng = random.Random(1)
    return [{"prompt": f"Q{i} ", "chosen": letters(rng, "+"), "rejected": letters(rng, "+")} for i in range(n)]


def longer_wins(n: int = 240) -> list[Row]:
    """Pairs of which the preferred answer is nothing but longer."""
    rng = random.Random(2)
    return [{"prompt": f"Q{i} ", "chosen": letters(rng, "a", 16), "rejected": letters(rng, "a", 4)} for i in range(n)]


def rated(n: int = 240, marks: str = "-=+") -> list[Row]:
    """Answers rated 1, 3 or 5 by the mark in them, two to a prompt; one that carries no mark is rated by a coin."""
    rng = random.Random(3)
    rows = []
    for i in range(n):
        grade = rng.randrange(3)
        mark = marks[grade] if marks else "a"
        rows.append({"prompt": f"Q{i // 2} ", "completion": letters(rng, mark), "score": 1 + 2 * grade})
    return rows


def config_for(data: Path, model: Path, out: Path, **changes: Any) -> RewardModelConfig:
    """Three epochs at a high rate on the CPU, a quarter of the prompts held out."""
    given: dict[str, Any] = {"data": str(data), "model": str(model), "output_dir": str(out), "held_out_fraction": 0.25}
    given |= {"device": "cpu", "threads": 1}
    return validate_as(RewardModelConfig, {**given, "num_train_epochs": 3, "learning_rate": 3e-3, **changes})


def train(config: RewardModelConfig, observe: Callback = lambda kind, facts: None) -> RewardTrainingOutcome:
    return train_reward_model(config, lambda folder: load_reward(str(folder), device="cpu"), observe)
