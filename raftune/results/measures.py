"""Metrics of an evaluation: value, interval and description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raftune.results.summary import MEASURES, OWN, ends_of
from raftune.sanitize import percent

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class MetricDescription:
    """One measure of metrics.json, in words: `name` is its key there, `interval` is empty where it has none."""

    name: str
    title: str
    value: str
    interval: str
    meaning: str


def measures(metrics: Metrics) -> Iterator[MetricDescription]:
    """Every measure that has a value, the parts of a score beneath it; what is not known here is left out."""
    for name, measure in MEASURES.items():
        prefix = {"reward": "rewards/", "held_out": "held_out/rewards/"}.get(name)
        parts = sorted(key for key in metrics if prefix and key.startswith(prefix) and key.endswith("/mean"))
        titles = {key: key.removeprefix(prefix or "").removesuffix("/mean") for key in parts}
        if (value := metrics.get(name)) is not None:
            only = f" ({titles[parts[0]]})" if len(parts) == 1 else ""
            yield describe(name, measure.title + only, value, measure.write, measure.meaning)
        for key in parts:
            if metrics[key] is not None and metrics[key] != value:
                yield describe(key, f"  {titles[key]}", metrics[key], measure.write, "a part of it")
    for key in sorted(name for name in metrics if name.startswith(OWN)):
        if metrics[key] is not None:
            yield describe(key, key.removeprefix(OWN), metrics[key], "{:.4g}".format, "a metric of your own")


def describe(name: str, title: str, value: Any, write: Callable[[float], str], meaning: str) -> MetricDescription:
    if not isinstance(value, Mapping):
        return MetricDescription(name, title, write(value), "", meaning)
    ends = ends_of(value)
    between = f"{write(ends[0])} … {write(ends[1])}" if ends else f"none, n = {value.get('n', '?')}"
    return MetricDescription(name, title, write(value["mean"]), between, meaning)


def spread(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean with its 95 % interval, 1.310 [1.101, 1.519]; without one, with the number of prompts it stands on."""
    if not interval:
        return "–"
    if (ends := ends_of(interval)) is None:
        return f"{interval['mean']:.{digits}f} (n = {interval['n']}, too few for an interval)"
    return f"{interval['mean']:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


@dataclass(frozen=True)
class BestOfKPoint:
    """The reward of the best of k samples, its interval in words, and the share of the largest K's gain that it has."""

    k: int
    reward: float
    interval: str
    gain: float | None


def best_of_k(metrics: Metrics, name: str = "best_of_k") -> list[BestOfKPoint]:
    """The curve, k ascending. The gain of k is its reward over that of one sample, as a share of the largest K's.

    It is None where the largest K gains nothing: then there is nothing to share.
    """
    curve = {int(k): value for k, value in (metrics.get(name) or {}).items() if value}
    if not curve:
        return []
    single, largest = curve.get(1), curve[max(curve)]["mean"]
    points = []
    for k, value in sorted(curve.items()):
        gain = None
        if single and largest > single["mean"]:
            gain = (value["mean"] - single["mean"]) / (largest - single["mean"])
        points.append(BestOfKPoint(k, value["mean"], describe("", "", value, "{:.3f}".format, "").interval, gain))
    return points


def loss_ends(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss of the first and of the last tenth of the steps: one mini-batch alone says little."""
    tenth = -(-len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def worth_of_k(curve: Sequence[BestOfKPoint]) -> str:
    """What a smaller K would give, in words: the largest k below the last, `K=4 gives 93 % of the gain of K=8`."""
    if len(curve) < 3:
        return ""
    last, before = curve[-1], curve[-2]
    if before.gain is None:
        return f"K={last.k} gains nothing over one answer: all answers to a prompt score about the same"
    return f"K={before.k} gives {percent(before.gain)} of the gain of K={last.k}"
