"""Reward `repetition`: a penalty for repeated n-grams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from raftune.errors import ConfigError
from raftune.rewards.builtin.text import Unit, UnitsReward
from raftune.rewards.registry import builtin


@builtin("repetition", media=("text", "messages"), example={"ngram_size": 3})
@dataclass
class RepetitionReward(UnitsReward):
    """Minus the share of n-grams that occurred earlier in the completion, in [-1, 0]; case is ignored.

    `a b a b a b` has the bigrams ab, ba, ab, ba, ab: three of five are repeated, and the reward is -0.6.
    """

    ngram_size: Annotated[int, Field(description="Units per n-gram.")] = 3
    unit: Unit = "words"

    def __post_init__(self) -> None:
        if self.ngram_size < 1:
            raise ConfigError(f"repetition: ngram_size must be 1 or more; got {self.ngram_size}. Usual is 3.")

    def value(self, units: list[Any]) -> float:
        folded = [unit.casefold() if isinstance(unit, str) else unit for unit in units]
        ngrams = list(zip(*(folded[i:] for i in range(self.ngram_size)), strict=False))
        return len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0
