"""Axes of charts: ranges, ticks and label positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Maps [low, high] of the data to [start, end] of the page, linearly or by the logarithm; `ticks` lie inside."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log2(v) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (at - low) / (high - low)
        return self.start + share * (self.end - self.start)


def y_scale(values: Sequence[float], start: float, end: float, most: int = 6) -> AxisScale:
    """A scale whose ends are ticks; it begins at zero where that costs little, a single value lies in its middle."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        room = abs(low) * 0.1 or 0.5
        low, high = low - room, high + room
        low = max(low, 0.0) if values and values[0] >= 0 else low
    elif 0 <= low <= high / 2:
        low = 0.0
    step = nice_step(high - low, most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return AxisScale(ticks[0], ticks[-1], start, end, ticks)


def x_scale(values: Sequence[float], start: float, end: float, *, log: bool = False, most: int = 9) -> AxisScale:
    """A scale from the first value to the last, with ticks at whole numbers where the values are whole.

    A logarithmic one has its ticks at the values.
    """
    found = sorted(set(values)) or [0.0]
    low, high = found[0], found[-1]
    if log or low == high or len(found) <= 4:
        return AxisScale(low, high, start, end, thinned(found, most), log)
    step = nice_step(high - low, most - 1)
    if all(value == int(value) for value in found):
        step = max(1.0, math.ceil(step))
    ticks = tuple(round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return AxisScale(low, high, start, end, ticks)


def thinned(values: Sequence[float], most: int) -> tuple[float, ...]:
    """At most so many of the values, evenly by number, the last among them."""
    every = max(1, math.ceil(len(values) / most))
    return tuple(values[::-1][::every][::-1])


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that divides the span into at most so many parts."""
    rough = span / max(1, parts)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1.0, 2.0, 2.5, 5.0, 10.0) if n * power >= rough * (1 - 1e-9))


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """The tick with as many decimals as tell it from its neighbours, and a true minus."""
    largest = max(abs(t) for t in ticks)
    step = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0)
    if largest >= 1e6 or (largest and largest < 1e-3):
        digits = next((d for d in range(2, 15) if len({f"{t:.{d}g}" for t in ticks}) == len(ticks)), 15)
        return f"{value:.{digits}g}".replace("-", "−")
    digits = next((d for d in range(9) if all(abs(t - round(t, d)) < step * 1e-6 for t in ticks)), 9)
    return f"{value:,.{digits}f}".replace("-", "−")


def spread(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """The places moved as little as it takes that each is so far from the next, inside [low, high] if there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    floor = low
    for i in order:
        moved[i] = floor = max(moved[i], floor)
        floor += distance
    ceiling = high
    for i in reversed(order):
        moved[i] = ceiling = min(moved[i], ceiling)
        ceiling -= distance
    return moved
