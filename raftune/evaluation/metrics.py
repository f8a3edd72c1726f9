"""Metrics of a round's policy, computed from its held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.config.evaluation import EvaluationConfig
from raftune.config.extensions import GUIDE, code_hash, load_extension
from raftune.errors import ConfigError
from raftune.evaluation.best_of import best_of_k_estimates
from raftune.evaluation.bootstrap import Interval, interval, mean_by_prompt, ratio_interval
from raftune.evaluation.columns import prompt_numbers
from raftune.evaluation.diversity import distinct, msttr, numbered, similarities, unique
from raftune.evaluation.images import FeatureMetrics, PixelMetrics
from raftune.protocols import Metric
from raftune.records import INVALID

_Made = TypeVar("_Made", bound=Metric)
METRICS: dict[str, Metric] = {}  # the built-in metrics
# What a metric may need: columns that a run's evaluation has only where its family or configuration gives them.
NEEDS = frozenset(
    {"scores", "text", "image", "category", "features", "log_probs", "own_log_probs", "references", INVALID}
)
MOST_NATS = 700.0  # a token; exp of more overflows


def metric(name: str) -> Callable[[type[_Made]], type[_Made]]:
    """Enters the decorated class as the built-in metric of this name."""

    def enter(cls: type[_Made]) -> type[_Made]:
        METRICS[name] = cls()
        return cls

    return enter


@metric("rewards")
class RewardMetrics:
    """The reward of the policy, of best-of-k (unbiased), and of each part and held-out reward, with intervals."""

    needs = frozenset({"scores"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        groups = prompt_numbers(samples)
        scores = usable(samples, "score", "status")
        found: dict[str, Any] = {"reward": interval(mean_by_prompt(groups, scores)), "reward_std": _std(scores)}
        found["best_of_k"] = best_of_curve(groups, scores)
        found["frac_reward_zero_std"] = share_without_spread(groups, scores)
        for name in samples.column_names:
            if "rewards/" in name:
                values = samples.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
                found[f"{name}/mean"] = interval(mean_by_prompt(groups, values))
                found[f"{name}/std"] = _std(values)
        if "held_out/score" in samples.column_names:
            held_out = usable(samples, "held_out/score", "held_out/status")
            found["held_out"] = interval(mean_by_prompt(groups, held_out))
            found["held_out_best_of_k"] = best_of_curve(groups, held_out)
        statuses, counts = np.unique(
            samples.column("status").to_numpy(zero_copy_only=False).astype(str), return_counts=True
        )
        found["statuses"] = dict(zip(statuses.tolist(), counts.tolist(), strict=True))
        return found


@metric("divergence")
class KLMetrics:
    """KL to the start: the mean of log p - log p0 over the policy's own samples, nats per answer, and per token."""

    needs = frozenset({"log_probs"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        ratio = (_column(samples, "log_prob") - _column(samples, "log_prob_start")).astype(np.float64)
        groups = prompt_numbers(samples)
        found: dict[str, Any] = {"kl": interval(mean_by_prompt(groups, ratio))}
        if "completion_ids" in samples.column_names:
            found["kl_per_token"] = ratio_interval(by_prompt(groups, ratio), by_prompt(groups, token_counts(samples)))
        return found


@metric("entropy")
class EntropyMetrics:
    """Entropy of the policy in nats: the mean of -log p over its own samples, per completion and per token.

    Per answer it is an unbiased estimate of the cross-entropy from the distribution sampled from to the policy's own
    (untempered, whole) law of answers of at most max_completion_length tokens. At temperature 1 and without top_p,
    top_k, min_p or a penalty the two laws are one, and it is the policy's entropy, the mean over prompts. `per token`
    is the ratio of the sums over all samples, EOS counted.
    """

    needs = frozenset({"own_log_probs"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        groups, nats = prompt_numbers(samples), -own_log_probs(samples)
        found: dict[str, Any] = {"entropy": interval(mean_by_prompt(groups, nats))}
        if "completion_ids" in samples.column_names:
            found["entropy_per_token"] = ratio_interval(
                by_prompt(groups, nats), by_prompt(groups, token_counts(samples))
            )
        return found


@metric("perplexity")
class PerplexityMetrics:
    """exp(-Σ log p / Σ tokens) over reference answers to the held-out prompts, EOS counted, the interval over prompts.

    None where an answer is impossible under the policy, which makes it infinite. `references` counts the answers
    measured, left out (empty, or unfit for the model) and impossible.
    """

    needs = frozenset({"references"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        nats, tokens = -_column(samples, "reference_log_prob"), _column(samples, "tokens")
        left_out, impossible = int(np.isnan(nats).sum()), int(np.isposinf(nats).sum())
        counts = {"measured": len(nats) - left_out - impossible, "left_out": left_out, "impossible": impossible}
        rate = None if impossible else ratio_interval(nats, tokens)
        return {"perplexity": exponential(rate), "references": counts}


@metric("text")
class TextMetrics:
    """Length, the share cut off, and how varied the words are: over all samples, and inside a prompt's group."""

    needs = frozenset({"text"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        words, groups = numbered(texts_of(samples)), prompt_numbers(samples)
        found: dict[str, Any] = {f"distinct_{n}": distinct(words, n) for n in (1, 2)}
        found |= {f"unique_{n}": unique(words, n) for n in (1, 2)}
        found |= {"msttr_100": msttr(words, 100), "similarity": interval(similarities(words, groups))}
        if "completion_ids" in samples.column_names:
            found["completions/mean_length"] = interval(mean_by_prompt(groups, token_counts(samples)))
        if "finish" in samples.column_names:
            found["completions/clipped_ratio"] = float(
                np.mean([f == "length" for f in samples.column("finish").to_pylist()])
            )
        return found


@metric("validity")
class ValidityMetrics:
    """Share of invalid samples."""

    needs = frozenset({INVALID})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        count = samples.num_rows
        return {"invalid_ratio": (count - samples.column(INVALID).null_count) / count if count else None}


metric("pixels")(PixelMetrics)
metric("vectors")(FeatureMetrics)


def load_metrics(config: EvaluationConfig) -> dict[str, Metric]:
    """The user's own metrics by name. Raises ConfigError where one is not there, or is not whole."""
    found = {}
    for name, spec in zip(config.metric_names, config.metrics, strict=True):
        made: Metric = load_extension(
            spec.spec,
            "evaluation.metrics",
            spec.options,
            f"evaluation.metrics, options of {name}",
            methods={"__call__": ("samples",)},
            attributes=("needs",),
        )
        if not isinstance(made.needs, set | frozenset | tuple | list) or not set(made.needs) <= NEEDS:
            raise ConfigError(
                f"evaluation.metrics: `needs` of {spec.spec} must be of {', '.join(sorted(NEEDS))}; got "
                f"{made.needs!r}. {GUIDE}"
            )
        found[name] = made
    return found


def metric_code(config: EvaluationConfig) -> dict[str, str]:
    """The hashes of the files that the user's own metrics are read from."""
    names = zip(config.metric_names, config.metrics, strict=True)
    return {f"classes of the metric {name}": code_hash(spec.spec) for name, spec in names}


def measured(metric: Metric, samples: pa.Table) -> float | Interval | None:
    """What a custom metric gives: its number, or the mean of its value of each sample, with an interval.

    Raises TypeError for anything else; whatever the metric raises.
    """
    result: Any = metric(samples)
    if isinstance(result, int | float | np.number):
        return float(result) if math.isfinite(result) else None
    values = np.asarray(result, dtype=np.float64)
    if values.shape != (samples.num_rows,):
        raise TypeError(
            f"it must return a number, or one for each of the {samples.num_rows} samples; got shape {values.shape}"
        )
    return interval(mean_by_prompt(prompt_numbers(samples), values))


def usable(samples: pa.Table, column: str, status: str) -> FloatArray:
    """The column's values, NaN where the status is not ok."""
    values = _column(samples, column)
    ok = np.array([s == "ok" for s in samples.column(status).to_pylist()])
    return np.where(ok, values, np.nan)


def best_of_curve(groups: IntArray, scores: FloatArray) -> dict[str, Any]:
    """For k = 1, 2, 4, … the reward of the best of k samples; prompts with fewer usable scores are left out of that
    k.
    """
    usable = np.isfinite(scores)
    order = np.argsort(groups[usable], kind="stable")
    sorted_scores = scores[usable][order]
    counts = np.bincount(groups[usable], minlength=int(groups.max(initial=-1)) + 1)
    starts = np.cumsum(counts) - counts
    most = int(counts.max(initial=0))
    ks = sorted({*(2**i for i in range(most.bit_length())), *({most} if most else ())})
    estimates = np.full((len(counts), len(ks)), np.nan)
    for n in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == n)
        table = sorted_scores[starts[rows][:, None] + np.arange(n)]
        reached = [k for k in ks if k <= n]
        estimates[rows, : len(reached)] = best_of_k_estimates(table, reached)
    return {str(k): interval(estimates[:, i]) for i, k in enumerate(ks)}


def share_without_spread(groups: IntArray, scores: FloatArray) -> float:
    """The share of prompts whose usable scores are all equal: nothing can be learned from ranking these."""
    spreads = [np.ptp(s) for g in range(int(groups.max(initial=-1)) + 1) if len(s := _finite(scores[groups == g]))]
    return float(np.mean([spread == 0 for spread in spreads])) if spreads else float("nan")


def texts_of(samples: pa.Table) -> Iterator[str]:
    """The completions one after another, a chunk of the table in memory at a time."""
    for chunk in samples.column("completion").chunks:
        yield from chunk.to_pylist()


def token_counts(samples: pa.Table) -> FloatArray:
    """(N,) tokens of each completion."""
    counts = pc.list_value_length(samples.column("completion_ids")).to_numpy(zero_copy_only=False)
    return np.nan_to_num(np.asarray(counts, dtype=np.float64))


def own_log_probs(samples: pa.Table) -> FloatArray:
    """(N,) nats of each answer under the policy that generated it: as computed, or else the sum of what generating
    noted.
    """
    if "log_prob" in samples.column_names:
        return _column(samples, "log_prob")
    sums = [
        math.nan if row is None else math.fsum(row)
        for chunk in samples.column("completion_logprobs").chunks
        for row in chunk.to_pylist()
    ]
    return np.array(sums, dtype=np.float64)


def by_prompt(groups: IntArray, values: FloatArray) -> FloatArray:
    """(P,) sums of each prompt's values; NaN where one of them is."""
    return np.bincount(groups, weights=values, minlength=int(groups.max(initial=-1)) + 1).astype(np.float64)


def exponential(rate: Interval | None) -> Interval | None:
    """The interval on the scale of exp, which keeps its order; None beyond what a float holds."""
    if rate is None or max(rate["mean"], rate["high"] or 0.0) > MOST_NATS:
        return None
    low, high = (None if end is None else math.exp(end) for end in (rate["low"], rate["high"]))
    return Interval(mean=math.exp(rate["mean"]), low=low, high=high, n=rate["n"])


def _finite(values: FloatArray) -> FloatArray:
    return values[np.isfinite(values)]


def _column(samples: pa.Table, name: str) -> FloatArray:
    return np.asarray(samples.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)


def _std(values: FloatArray) -> float | None:
    finite = _finite(values)
    return float(finite.std()) if len(finite) else None
