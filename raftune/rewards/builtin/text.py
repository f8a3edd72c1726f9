"""Base class of rewards that count the words, characters or tokens of a completion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.data.classifier_inputs import text_of
from raftune.errors import RewardError
from raftune.rewards.registry import BuiltInReward

Unit = Annotated[
    Literal["words", "characters", "tokens"],
    Field(description="What is counted: words (separated by white space), characters, or tokens (EOS included)."),
]


class UnitsReward(BuiltInReward, ABC):
    """A reward that is a function of a completion's units: words, characters, or token ids (EOS included)."""

    unit: Unit

    @abstractmethod
    def value(self, units: list[Any]) -> float: ...

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if self.unit == "tokens":
            if completion_ids is None:
                raise RewardError(
                    "unit: tokens needs completion_ids, which these samples lack; use words or characters"
                )
            return [self.value(ids) for ids in completion_ids]
        texts = [text_of(completion) for completion in completions]
        return [self.value(text.split() if self.unit == "words" else list(text)) for text in texts]
