"""Saves a reward model only if it is better than chance on held-out rows."""

from __future__ import annotations

from typing import Any

from raftune.evaluation.bootstrap import Interval
from raftune.results.measures import spread
from raftune.results.summary import ends_of

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
    if (ends := ends_of(measured)) is not None and ends[0] > chance:
        length = length_words(report) if objective == "pairwise" else ""
        return True, f"is better than chance{', but ' + length if length else ''}: {said}"
    return False, f"is not better than chance: {said}, where the interval must lie above {chance:g}"


def better_than_length(report: dict[str, Any]) -> bool:
    """Whether a model of preferences ranks more pairs than the rule that the longer (or the shorter) answer wins."""
    ends = ends_of(report["length"]["gain_over_length"] or {})
    return ends is not None and ends[0] > 0


def length_words(report: dict[str, Any]) -> str:
    """What a ruler does as well as the model, in words; empty where the model does better."""
    if better_than_length(report):
        return ""
    rule = "longer" if report["length"]["prefers_longer"] >= 0.5 else "shorter"
    gain = report["length"]["gain_over_length"]
    return f"not than the rule that the {rule} answer wins, over which it gains {spread(gain)}"


def words_of(name: str) -> str:
    return {"accuracy": "accuracy", "r2": "R²"}[name]
