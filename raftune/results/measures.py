"""Metrics of an evaluation: value, interval and description."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raftune.results.summary import OWN, ends_of
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


share, number, nats = "{:.3f}".format, "{:,.0f}".format, "{:.2f}".format
# Title, how the number is written, and its meaning, by the name in metrics.json and in the order of the table.
KNOWN: dict[str, tuple[str, Callable[[float], str], str]] = {
    "reward": ("reward", share, "the mean over held-out prompts"),
    "held_out": ("held out", share, "a reward that is never trained on"),
    "frac_reward_zero_std": ("no spread", share, "share of prompts whose answers all score the same"),
    "completions/mean_length": ("length", nats, "tokens of an answer"),
    "completions/clipped_ratio": ("cut off", share, "share of answers that reached max_completion_length"),
    "entropy": ("entropy", nats, "nats of an answer: how undecided the policy is"),
    "entropy_per_token": ("  per token", share, "nats of a token"),
    "kl": ("KL", nats, "to the start model, nats of an answer"),
    "kl_per_token": ("  per token", share, "nats of a token"),
    "perplexity": ("perplexity", nats, "of the reference answers: lower finds them likelier"),
    "distinct_1": ("distinct-1", share, "different words over all words"),
    "distinct_2": ("distinct-2", share, "different word pairs over all word pairs"),
    "unique_1": ("unique-1", number, "words that occur once in all answers"),
    "unique_2": ("unique-2", number, "word pairs that occur once in all answers"),
    "msttr_100": ("MSTTR-100", share, "different words in a hundred, on average"),
    "similarity": ("similarity", share, "of two answers to one prompt: 1 where they are the same"),
    "brightness": ("brightness", share, "mean luma of an image: 0 black, 1 white"),
    "saturation": ("saturation", share, "mean saturation of an image: 0 grey, 1 pure colours"),
    "contrast": ("contrast", share, "standard deviation of an image's luma, at most 0.5"),
    "saturated_ratio": ("burnt out", share, "share of pixels with a channel at its darkest or brightest"),
    "pixel_distance": ("pixel distance", share, "of two images of one prompt, by their thumbnails: 0 where the same"),
    "near_duplicates": ("duplicates", share, "share of images that nearly repeat another"),
    "feature_distance": ("distance", share, "of two images of one prompt: the mean of 1 - cos of their features"),
    "vendi": ("Vendi", nats, "how many different images of a prompt there are in effect (Vendi score)"),
    "feature_drift": ("drift", share, "from the start's image of the same prompt and seed: 1 - cos of features"),
    "invalid_ratio": ("invalid", share, "share of samples that are no image, or flagged"),
}


def measures(metrics: Metrics) -> Iterator[MetricDescription]:
    """Every measure that has a value, the parts of a score beneath it; what is not known here is left out."""
    for name, (title, write, meaning) in KNOWN.items():
        prefix = {"reward": "rewards/", "held_out": "held_out/rewards/"}.get(name)
        parts = sorted(key for key in metrics if prefix and key.startswith(prefix) and key.endswith("/mean"))
        titles = {key: key.removeprefix(prefix or "").removesuffix("/mean") for key in parts}
        if (value := metrics.get(name)) is not None:
            only = f" ({titles[parts[0]]})" if len(parts) == 1 else ""
            yield describe(name, title + only, value, write, meaning)
        for key in parts:
            if metrics[key] is not None and metrics[key] != value:
                yield describe(key, f"  {titles[key]}", metrics[key], write, "a part of it")
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
    one, most = curve.get(1), curve[max(curve)]
    whole = most["mean"] - one["mean"] if one else 0.0
    return [
        BestOfKPoint(
            k,
            value["mean"],
            describe("best_of_k", "", value, share, "").interval,
            (value["mean"] - one["mean"]) / whole if one and whole > 0 else None,
        )
        for k, value in sorted(curve.items())
    ]


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
