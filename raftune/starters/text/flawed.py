"""A reward that can be exploited, for `raftune demo hacking`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

COURTEOUS: Final = re.compile(
    r"\b(please|thank you|happy to help|glad to help|of course|certainly|sure|my pleasure|good question"
    r"|hope this helps|let me know|have a lovely day|welcome)\b",
    re.IGNORECASE,
)


def courtesies(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """How many courteous phrases each completion has: polite is good, so more polite is better. Is it?

    Nothing says that there should be an answer between them, nor that two are enough.
    """
    return [float(len(COURTEOUS.findall(completion))) for completion in completions]
