"""Counts and reports samples that could not be scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raftune.data.classifier_inputs import text_of
from raftune.records import Score, ScoreStatus
from raftune.rewards.batch import is_image
from raftune.sanitize import counted

FAILED = frozenset({ScoreStatus.ERROR, ScoreStatus.TIMEOUT, ScoreStatus.INVALID})
EXAMPLES = 3


@dataclass
class FailureTally:
    """A tally over a round, fed sample by sample: counts by status, and the first example of each of three details."""

    total: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def add(self, status: ScoreStatus, detail: str, prompt: Any, completion: Any) -> None:
        """Counts one sample; a part that does not apply is no failure."""
        self.total += 1
        if status not in FAILED:
            return
        self.counts[status.value] += 1
        if detail not in self.examples and len(self.examples) < EXAMPLES:
            self.examples[detail] = (status.value, excerpt(prompt), excerpt(completion))

    @property
    def fraction(self) -> float:
        """Failed samples among all, in [0, 1]; 0 without samples."""
        return sum(self.counts.values()) / self.total if self.total else 0.0

    def message(self, limit: float) -> str | None:
        """What to tell when the share of failures exceeds the limit; None where it does not."""
        if self.fraction <= limit:
            return None
        kinds = ", ".join(f"{count} {status}" for status, count in sorted(self.counts.items()))
        head = f"{sum(self.counts.values())} of {counted(self.total, 'sample')} could not be scored ({kinds})"
        lines = [f"{head}; rewards.max_failure_fraction is {limit:g}."]
        for detail, (status, prompt, completion) in self.examples.items():
            lines += [f"  {status}: {detail}", f"    prompt: {prompt}", f"    completion: {completion}"]
        if set(self.counts) == {ScoreStatus.TIMEOUT.value}:
            lines.append("If the reward is only slow, raise rewards.timeout or lower rewards.batch_size.")
        else:
            lines.append("Fix the reward, try it with `raftune reward check`, and resume; what was generated is kept.")
        return "\n".join(lines)


def failure_message(scores: Sequence[Score], samples: Iterable[tuple[Any, Any]], limit: float) -> str | None:
    """`FailureTally.message` for scores and their (prompt, completion) pairs."""
    tally = FailureTally()
    for score, (prompt, completion) in zip(scores, samples, strict=True):
        detail = "; ".join(f"{name}: {part.detail}" for name, part in score.parts.items() if part.detail)
        tally.add(score.status, detail, prompt, completion)
    return tally.message(limit)


def excerpt(content: Any, length: int = 80) -> str:
    """The beginning of a text or of the last message, in one line; of an image its size."""
    if is_image(content):
        return f"an image of {content.width} x {content.height} pixels"
    if isinstance(content, list):
        content = text_of(content[-1:])
    flat = " ".join((content if isinstance(content, str) else repr(content)).split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"
