"""Checks a reward: contract, determinism and speed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raftune.config.rewards import RewardSpec
from raftune.records import RewardPart
from raftune.rewards.batch import RewardBatch
from raftune.rewards.examples import example_batch, example_pictures
from raftune.rewards.failures import FAILED, excerpt
from raftune.rewards.loading import load_reward
from raftune.rewards.media import IMAGE_MEDIA, is_image, refuse_unfit
from raftune.rewards.process.executors import EventLoopThread, Executor, call, place

TOLERANCE = 1e-5  # relative: what regrouping a batch may change in float32
SHOWN = 5


@dataclass(frozen=True)
class FailedSample:
    """One sample that the reward could not score."""

    index: int
    status: str
    detail: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class CheckReport:
    """What one reward did with one batch; `None` where it could not be told, because calls failed."""

    name: str
    place: str  # thread, loop (async) or process
    accepts: tuple[str, ...] | None  # the keywords it takes; None: all of them
    samples: int
    returned: int | None  # how many values came back
    statuses: dict[str, int]
    mean: float | None
    lowest: float | None
    highest: float | None
    deterministic: bool | None  # two equal calls, equal values
    order_independent: bool | None  # a shuffled batch, the same value for each sample
    largest_order_change: float | None
    batch_independent: bool | None  # smaller calls, the same value for each sample
    mixed_sizes: bool | None  # images of several sizes in one call can be scored; None where none were tried
    notes: tuple[str, ...]  # what the reward says of how it read the samples
    samples_per_second: float
    failing: tuple[FailedSample, ...]

    @property
    def ok(self) -> bool:
        """True if every sample got a number or a None, the same when asked again, in any order, in smaller calls."""
        return not any(self.statuses.get(status.value) for status in FAILED) and bool(
            self.deterministic and self.order_independent and self.batch_independent
        )

    @property
    def constant(self) -> bool:
        """True where all samples that have a number have the same."""
        return self.lowest is not None and self.lowest == self.highest and self.samples > 1

    @property
    def findings(self) -> tuple[str, ...]:
        """What to know about the reward, one sentence each."""
        said = []
        if self.accepts is not None:
            said.append(f"takes only {', '.join(self.accepts)}: other columns do not reach it; add **kwargs to get all")
        if self.returned is not None and self.returned != self.samples:
            said.append(f"returns {self.returned} values for {self.samples} completions: it must return one for each")
        if self.deterministic is False:
            said.append(
                "gives other values when asked again: scores cannot be reproduced, and rescoring changes verdicts"
            )
        if self.order_independent is False or self.batch_independent is False:
            said.append(
                "a sample's value depends on the others in its batch: rewards.batch_size then shapes the scores"
            )
        if self.constant:
            said.append("gives every sample the same value: there is nothing to rank")
        if self.mixed_sizes is False:
            said.append(
                "fails where images of several sizes are in one call: give it the policy's own images only, or let "
                "it resize them"
            )
        return (*said, *self.notes)


def check_reward(
    reward: RewardSpec | str | Callable[..., Any],
    batch: RewardBatch | None = None,
    *,
    timeout: float = 120.0,
    tokenizer: Any = None,
    device: str = "auto",
    pictures: bool = False,
) -> CheckReport:
    """Calls the reward again and again: as it is, on the shuffled batch, on two halves of it.

    Without a batch it uses one of our own, with `images` or for a reward that reads nothing else one of images.
    Raises ConfigError and RewardError where the reward cannot be loaded, or reads the other medium alone.
    """
    loaded = load_reward(reward, timeout=timeout, tokenizer=tokenizer, device=device)
    limit = (reward.timeout if isinstance(reward, RewardSpec) else None) or timeout
    loop = EventLoopThread()
    seat = place(loaded, loop)
    if batch is not None:
        pictures = any(is_image(one) for one in batch.completions)
    elif loaded.media == IMAGE_MEDIA:
        pictures = True
    try:
        refuse_unfit({loaded.name: loaded.media}, "image" if pictures else "text")
        if batch is not None:
            return _report(loaded, seat, batch, limit)
        if not pictures:
            return _report(loaded, seat, example_batch(), limit)
        report = _report(loaded, seat, example_pictures(), limit)
        if report.deterministic is None:  # equal sizes fail as well
            return report
        mixed = not call(seat, example_pictures(mixed_sizes=True), limit).failed
        return replace(report, mixed_sizes=mixed)
    finally:
        seat.close()
        loop.close()


def _report(loaded: Any, seat: Executor, batch: RewardBatch, limit: float) -> CheckReport:
    order = list(range(len(batch)))
    random.Random(0).shuffle(order)
    call(seat, batch.take(range(min(1, len(batch)))), limit)  # the first call may load a model
    began = time.perf_counter()
    first = call(seat, batch, limit)
    seconds = time.perf_counter() - began
    second, shuffled = call(seat, batch, limit), call(seat, batch.take(order), limit)
    halves = [range(start, len(batch), 2) for start in (0, 1) if start < len(batch)]
    apart = [call(seat, batch.take(rows), limit) for rows in halves]
    restored = [shuffled.parts[order.index(i)] for i in range(len(batch))]
    joined = [apart[i % 2].parts[i // 2] for i in range(len(batch))]
    change = _largest_change(first.parts, restored)
    values = [part.value for part in first.parts if part.value is not None]
    whole = not any(outcome.failed for outcome in (first, second, shuffled, *apart))
    accepts = getattr(loaded, "accepts", None)
    return CheckReport(
        name=loaded.name,
        place=seat.place,
        accepts=None if accepts is None else tuple(sorted(accepts)),
        samples=len(batch),
        returned=first.returned,
        statuses=dict(Counter(part.status.value for part in first.parts)),
        mean=sum(values) / len(values) if values else None,
        lowest=min(values, default=None),
        highest=max(values, default=None),
        deterministic=first.parts == second.parts if whole else None,
        order_independent=change <= TOLERANCE if whole else None,
        largest_order_change=change if whole else None,
        batch_independent=_largest_change(first.parts, joined) <= TOLERANCE if whole else None,
        mixed_sizes=None,
        notes=tuple(getattr(loaded, "notes", tuple)()),
        samples_per_second=len(batch) / max(seconds, 1e-9),
        failing=tuple(_failing(first.parts, batch)),
    )


def _largest_change(before: Sequence[RewardPart], after: Sequence[RewardPart]) -> float:
    """The largest relative difference of two values; infinite where a status changed."""
    if any(a.status is not b.status for a, b in zip(before, after, strict=True)):
        return float("inf")
    pairs = [
        (a.value, b.value) for a, b in zip(before, after, strict=True) if a.value is not None and b.value is not None
    ]
    return max((abs(a - b) / max(1.0, abs(a), abs(b)) for a, b in pairs), default=0.0)


def _failing(parts: Sequence[RewardPart], batch: RewardBatch) -> list[FailedSample]:
    bad = [i for i, part in enumerate(parts) if part.status in FAILED][:SHOWN]
    return [
        FailedSample(
            i, parts[i].status.value, parts[i].detail, excerpt(batch.prompts[i]), excerpt(batch.completions[i])
        )
        for i in bad
    ]
