"""The text of a completion, and its pieces."""

from __future__ import annotations

from typing import Any, Literal

from raftune.errors import RewardError

TEXT_MEDIA = frozenset({"text", "messages"})
Unit = Literal["words", "characters", "tokens"]


def text_of(completion: Any) -> str:
    """The text itself; of a message list, the contents of its messages, joined by line breaks."""
    if isinstance(completion, str):
        return completion
    return "\n".join(_content(message["content"]) for message in completion if message.get("content"))


def pieces(completions: list[Any], unit: Unit, completion_ids: list[list[int]] | None) -> list[list[Any]]:
    """Each completion as a list of words (split at white space), characters, or token ids (EOS included)."""
    if unit == "tokens":
        if completion_ids is None:
            raise RewardError("unit: tokens needs completion_ids, which these samples lack; use words or characters")
        return completion_ids
    texts = [text_of(completion) for completion in completions]
    return [text.split() if unit == "words" else list(text) for text in texts]


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)
