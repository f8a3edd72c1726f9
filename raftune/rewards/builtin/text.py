"""Text of a completion, split into words or lines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from raftune.data.classifier_inputs import text_of
from raftune.errors import RewardError

__all__ = ["TEXT_MEDIA", "Unit", "pieces", "text_of"]

TEXT_MEDIA = frozenset({"text", "messages"})
Unit = Annotated[
    Literal["words", "characters", "tokens"],
    Field(description="What is counted: words (separated by white space), characters, or tokens (EOS included)."),
]


def pieces(completions: list[Any], unit: Unit, completion_ids: list[list[int]] | None) -> list[list[Any]]:
    """Each completion as a list of words (split at white space), characters, or token ids (EOS included)."""
    if unit == "tokens":
        if completion_ids is None:
            raise RewardError("unit: tokens needs completion_ids, which these samples lack; use words or characters")
        return completion_ids
    texts = [text_of(completion) for completion in completions]
    return [text.split() if unit == "words" else list(text) for text in texts]
