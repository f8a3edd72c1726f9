"""Checks a reward: contract, determinism and speed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raftune.config.rewards import RewardSpec
from raftune.data.images import require_pillow
from raftune.records import RewardPart
from raftune.rewards.batch import IMAGE_MEDIA, RewardBatch, check_media, is_image
from raftune.rewards.loading import load_reward
from raftune.rewards.outcome import FAILED, excerpt
from raftune.rewards.process.executors import EventLoopThread, call, executor_for

TOLERANCE = 1e-5  # relative: what regrouping a batch may change in float32
SHOWN = 5
TEXTS = [
    *("The answer is 42.", "", "I do not know.", "#### 1,000", "Yes", "no", "\\boxed{7}", "word " * 200),
    *("Naïve — 東京 🙂", "<think>a</think> b", "  spaced  ", "Line one.\nLine two.", "42", "-3.5", "Well.", "A a A a"),
]
LONG = "a large green square to the left of " + "a very small blue ring and " * 30
CAPTIONS = ("a red disc", "nothing at all", "x", LONG)
SIZES = ((64, 64), (48, 32), (20, 100), (7, 5))  # pixels: width, height


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
        sentences = []
        if self.accepts is not None:
            names = ", ".join(self.accepts)
            sentences.append(f"takes only {names}: other columns do not reach it; add **kwargs to get all")
        if self.returned not in (None, self.samples):
            values = f"{self.returned} values for {self.samples} completions"
            sentences.append(f"returns {values}: it must return one for each")
        if self.deterministic is False:
            sentences.append(
                "gives other values when asked again: scores cannot be reproduced, and rescoring changes verdicts"
            )
        if self.order_independent is False or self.batch_independent is False:
            sentences.append(
                "a sample's value depends on the others in its batch: rewards.batch_size then shapes the scores"
            )
        if self.constant:
            sentences.append("gives every sample the same value: there is nothing to rank")
        if self.mixed_sizes is False:
            sentences.append(
                "fails where images of several sizes are in one call: give it the policy's own images only, or let "
                "it resize them"
            )
        return (*sentences, *self.notes)


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

    Without a batch it uses examples, with `pictures` or for a reward that reads nothing else images.
    Raises ConfigError and RewardError where the reward cannot be loaded, or reads the other medium alone.
    """
    loaded = load_reward(reward, timeout=timeout, tokenizer=tokenizer, device=device)
    limit = (reward.timeout if isinstance(reward, RewardSpec) else None) or timeout
    loop = EventLoopThread()
    executor = executor_for(loaded, loop)
    examples = batch is None
    if batch is not None:
        pictures = any(is_image(completion) for completion in batch.completions)
    else:
        pictures = pictures or loaded.media == IMAGE_MEDIA
        batch = example_images() if pictures else example_batch()
    order = list(range(len(batch)))
    random.Random(0).shuffle(order)
    try:
        check_media({loaded.name: loaded}, "image" if pictures else "text")
        call(executor, batch.take(range(min(1, len(batch)))), limit)  # the first call may load a model
        started = time.perf_counter()
        first = call(executor, batch, limit)
        seconds = time.perf_counter() - started
        second, shuffled = call(executor, batch, limit), call(executor, batch.take(order), limit)
        halves = [range(start, len(batch), 2) for start in (0, 1) if start < len(batch)]
        apart = [call(executor, batch.take(rows), limit) for rows in halves]
        complete = not any(outcome.failed for outcome in (first, second, shuffled, *apart))
        mixed_sizes = None
        if examples and pictures and complete:  # otherwise equal sizes fail as well
            mixed_sizes = not call(executor, example_images(mixed_sizes=True), limit).failed
    finally:
        executor.close()
        loop.close()
    order_change = _largest_change(first.parts, [shuffled.parts[order.index(i)] for i in range(len(batch))])
    batch_change = _largest_change(first.parts, [apart[i % 2].parts[i // 2] for i in range(len(batch))])
    values = [part.value for part in first.parts if part.value is not None]
    failing = []
    for i, (part, prompt, completion) in enumerate(zip(first.parts, batch.prompts, batch.completions, strict=True)):
        if part.status in FAILED:
            failing.append(FailedSample(i, part.status.value, part.detail, excerpt(prompt), excerpt(completion)))
    return CheckReport(
        name=loaded.name,
        place=executor.place,
        accepts=None if loaded.accepts is None else tuple(sorted(loaded.accepts)),
        samples=len(batch),
        returned=first.returned,
        statuses=dict(Counter(part.status.value for part in first.parts)),
        mean=sum(values) / len(values) if values else None,
        lowest=min(values, default=None),
        highest=max(values, default=None),
        deterministic=first.parts == second.parts if complete else None,
        order_independent=order_change <= TOLERANCE if complete else None,
        largest_order_change=order_change if complete else None,
        batch_independent=batch_change <= TOLERANCE if complete else None,
        mixed_sizes=mixed_sizes,
        notes=loaded.notes(),
        samples_per_second=len(batch) / max(seconds, 1e-9),
        failing=tuple(failing[:SHOWN]),
    )


def _largest_change(before: Sequence[RewardPart], after: Sequence[RewardPart]) -> float:
    """The largest relative difference of two values; infinite where a status changed."""
    change = 0.0
    for a, b in zip(before, after, strict=True):
        if a.status is not b.status:
            return float("inf")
        if a.value is not None and b.value is not None:
            change = max(change, abs(a.value - b.value) / max(1.0, abs(a.value), abs(b.value)))
    return change


def example_batch() -> RewardBatch:
    """Sixteen short completions: empty, long, without a number, beyond ASCII."""
    count = len(TEXTS)
    answers = ["42", "1000", None, "7"] * (count // 4)
    ids = [list(range(1, len(text.split()) + 2)) for text in TEXTS]
    return RewardBatch(["What is the answer?"] * count, list(TEXTS), {"answer": answers, "solution": answers}, ids)


def example_images(*, mixed_sizes: bool = False) -> RewardBatch:
    """Sixteen images of 64 x 64 pixels, or of four sizes: flat, noise, gradients, discs; one caption is very long."""
    random = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
    arrays = []
    for i in range(4):
        colour = np.roll(np.array([230.0, 120.0, 20.0]), i) * (i < 3)  # the fourth is black
        disc = ((across - 0.3 - 0.1 * i) ** 2 + (down - 0.5) ** 2 < 0.04)[..., None]
        slope = (across if i % 2 else down)[..., None]
        noise = random.integers(0, 256, (64, 64, 3))
        flat = np.broadcast_to(colour, (64, 64, 3))
        arrays += [flat, noise, slope * np.maximum(colour, 60), np.where(disc, colour, 200)]
    images: list[Any] = [require_pillow().fromarray(np.asarray(pixels).astype(np.uint8)) for pixels in arrays]
    if mixed_sizes:
        images = [image.resize(SIZES[i % len(SIZES)]) for i, image in enumerate(images)]
    captions: list[Any] = [CAPTIONS[i // 4] for i in range(len(images))]
    return RewardBatch(captions, images, {"answer": list(captions)})
