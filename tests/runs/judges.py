"""Held-out rewards for tests: they run in a process of their own, which imports this file and nothing heavy."""

from __future__ import annotations

from typing import Any


def low(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    """Answers of low numbers are good."""
    return [-float(answer) for answer in completions]
