"""A reward model is saved only if held-out rows show that it is better than chance."""

from __future__ import annotations

from typing import Any

from raftune.interval import Interval

FEWEST = 10  # held-out prompts: below, a bootstrap interval says nothing


def verdict(objective: str, report: dict[str, Any]) -> tuple[bool, str]:
    """Whether the model is better than chance, and why in words that may follow "the model"."""
    name, chance = ("accuracy", 0.5) if objective == "pairwise" else ("r2", 0.0)
    measured: Interval | None = report[name]
    if measured is None:
        return False, "cannot be judged: all held-out ratings are alike"
    said = f"{words_of(name)} {spread(measured)} on {measured['n']:,} held-out prompts"
    if measured["n"] < FEWEST:
        return False, f"cannot be told from chance: {said}, and {FEWEST} are needed at least: give more rows"
    if measured["low"] > chance:
        return True, f"is better than chance: {said}"
    return False, f"is not better than chance: {said}, where the interval must lie above {chance:g}"


def words_of(name: str) -> str:
    return {"accuracy": "accuracy", "r2": "R²"}[name]


def spread(measured: Interval) -> str:
    """A mean and its interval."""
    return f"{measured['mean']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"
