"""Parses dialogues: HH-RLHF texts and lists of messages."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from raftune.data.rows import SkipReason, UnusableRow

Message = dict[str, Any]
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
NAMES = {role: name for name, role in SPEAKERS.items()}
SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")
_TURN = re.compile(r"(?:\A\s*|\r?\n\r?\n)(Human|Assistant):")


def parse_dialogue(text: str, column: str) -> list[Message]:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …" as messages, without the blanks around them."""
    first, *rest = _TURN.split(text)
    if first.strip():
        raise UnusableRow(SkipReason.DISORDER, f"{column}: there is text before the first turn: {excerpt(first)}")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return ordered([{"role": SPEAKERS[name], "content": words.strip()} for name, words in pairs], column)


def has_turns(text: str) -> bool:
    return _TURN.search(text) is not None


def as_text(messages: list[Message]) -> str:
    """The messages in the manner of HH-RLHF, each after a blank line and the speaker's name."""
    return "".join(f"\n\n{NAMES[m['role']]}: {m['content']}" for m in messages)


def prompt_text(messages: list[Message]) -> str:
    """The dialogue so far, up to where the assistant is to speak."""
    return f"{as_text(messages)}\n\nAssistant:"


def answer_text(messages: list[Message]) -> str:
    """What follows `prompt_text`: the answer, and further turns where there are any."""
    return f" {messages[0]['content']}{as_text(messages[1:])}"


def read_messages(value: list[Any], column: str) -> list[Message]:
    """The messages, of known roles in an order that can be. Keys that are None (Arrow adds them) are left out."""
    return ordered([read_message(message, column) for message in value], column)


def read_message(message: Any, column: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UnusableRow(
            SkipReason.WRONG_TYPE, f"{column}: a message must have role and content; got {excerpt(message)}"
        )
    if message["role"] not in ROLES:
        raise UnusableRow(SkipReason.DISORDER, f"{column}: {message['role']!r} is none of the roles {', '.join(ROLES)}")
    found = {name: value for name, value in message.items() if value is not None}
    if not isinstance(found.setdefault("content", ""), str | list):
        raise UnusableRow(
            SkipReason.WRONG_TYPE, f"{column}: content must be a text; got {type(found['content']).__name__}"
        )
    return found


def ordered(messages: list[Message], column: str) -> list[Message]:
    """The messages, whose speakers take turns: nobody but a tool speaks twice in a row."""
    roles = [message["role"] for message in messages]
    for before, role in pairwise(roles):
        if (before == role != "tool") or role in SYSTEM:
            raise UnusableRow(SkipReason.DISORDER, f"{column}: {role} follows {before}")
    return messages


def begins(messages: list[Message], column: str) -> list[Message]:
    """The messages, of which the first, after a system prompt, is the user's."""
    spoken = [message["role"] for message in messages if message["role"] not in SYSTEM]
    if spoken[:1] not in ([], ["user"]):
        raise UnusableRow(SkipReason.DISORDER, f"{column}: the first turn is the {spoken[0]}'s")
    return messages


def ends_with_assistant(messages: list[Message], column: str) -> list[Message]:
    if not messages or messages[-1]["role"] != "assistant":
        last = f"the last turn is the {messages[-1]['role']}'s" if messages else "there is no turn"
        raise UnusableRow(SkipReason.NOT_ASSISTANT, f"{column}: {last}")
    return messages


def says_something(message: Message) -> bool:
    """Whether the message has a text that is not blank, an image, or a call of a tool."""
    content = message["content"]
    if isinstance(content, str):
        return bool(content.strip()) or bool(message.get("tool_calls"))
    return any(not isinstance(part, dict) or part.get("type") != "text" or _blankless(part) for part in content)


def _blankless(part: Message) -> bool:
    return bool(str(part.get("text") or "").strip())


def shared_turns(left: list[Message], right: list[Message]) -> int:
    """The length of the prompt that two dialogues share: it ends with the user's turn, and leaves an answer to each.

    0 where there is none.
    """
    most = min(len(left), len(right)) - 1
    same = next((i for i in range(most) if left[i] != right[i]), most)
    return next((i for i in range(same, 0, -1) if left[i - 1]["role"] in ("user", "tool")), 0)


def excerpt(value: Any, width: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= width else shown[: width - 1] + "…"
