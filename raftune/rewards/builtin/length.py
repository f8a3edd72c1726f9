"""Reward `length`: the distance of a completion's length from a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from raftune.errors import ConfigError
from raftune.rewards.builtin.text import Unit, UnitsReward
from raftune.rewards.registry import builtin


@builtin("length", media=("text", "messages"), example={"target": 20})
@dataclass
class LengthReward(UnitsReward):
    """0 for a length within [min, max] or at the target, otherwise minus the relative distance to the nearest bound.

    A length of 30 against a target of 20 gives -0.5. Give either target, or min, max or both.
    """

    target: Annotated[float | None, Field(description="The target length.")] = None
    min: Annotated[float | None, Field(description="The smallest length without a penalty.")] = None
    max: Annotated[float | None, Field(description="The largest length without a penalty.")] = None
    unit: Unit = "words"

    def __post_init__(self) -> None:
        bounds = (self.min, self.max)
        if (self.target is None) == (bounds == (None, None)):
            raise ConfigError(
                "length needs either target, or min, max or both; give `target: 20`, or `min: 10` and `max: 30`"
            )
        self._low, self._high = (self.target, self.target) if self.target is not None else bounds
        if any(bound is not None and bound < 0 for bound in (self._low, self._high)):
            raise ConfigError(
                f"length: target, min and max must be 0 or more; got {self.target}, {self.min}, {self.max}"
            )
        if self._low is not None and self._high is not None and self._low > self._high:
            raise ConfigError(f"length: min must not exceed max; got min {self.min} and max {self.max}")

    def value(self, units: list[Any]) -> float:
        if self._low is not None and len(units) < self._low:
            return (len(units) - self._low) / self._low
        if self._high is not None and len(units) > self._high:
            return (self._high - len(units)) / max(self._high, 1.0)
        return 0.0
