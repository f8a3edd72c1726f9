"""Metrics of a round's policy, computed from its held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray, IntArray
from raftune.config.evaluation import EvaluationConfig
from raftune.config.extensions import GUIDE, code_hash, load_extension
from raftune.errors import ConfigError
from raftune.evaluation.bootstrap import (
    Interval,
    best_of_k_estimates,
    interval,
    ks_up_to,
    mean_by_prompt,
    numbers_of,
    prompt_numbers,
    ratio_interval,
    usable,
)
from raftune.evaluation.diversity import numbered, similarities, word_measures
from raftune.evaluation.images import FeatureMetrics, PixelMetrics
from raftune.protocols import Metric
from raftune.records import INVALID

# What a metric may need: columns that a run's evaluation has only where its family or configuration gives them.
NEEDS = frozenset(
    {"scores", "text", "image", "category", "features", "log_probs", "own_log_probs", "references", INVALID}
)
MOST_NATS = 700.0  # a token; exp of more overflows


class RewardMetrics:
    """The reward of the policy, of best-of-k (unbiased), and of each part and held-out reward, with intervals."""

    needs = frozenset({"scores"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        groups, scores = prompt_numbers(samples), usable(samples, "score", "status")
        by_prompt = [finite(scores[groups == group]) for group in range(int(groups.max(initial=-1)) + 1)]
        flat = [np.ptp(values) == 0 for values in by_prompt if len(values)]
        measures: dict[str, Any] = {
            "reward": interval(mean_by_prompt(groups, scores)),
            "reward_std": deviation(scores),
            "best_of_k": best_of_curve(groups, scores),
            "frac_reward_zero_std": float(np.mean(flat)) if flat else float("nan"),
        }
        for name in samples.column_names:
            if "rewards/" in name:
                values = numbers_of(samples, name)
                measures[f"{name}/mean"] = interval(mean_by_prompt(groups, values))
                measures[f"{name}/std"] = deviation(values)
        if "held_out/score" in samples.column_names:
            held_out = usable(samples, "held_out/score", "held_out/status")
            measures["held_out"] = interval(mean_by_prompt(groups, held_out))
            measures["held_out_best_of_k"] = best_of_curve(groups, held_out)
        statuses = samples.column("status").to_numpy(zero_copy_only=False).astype(str)
        names, counts = np.unique(statuses, return_counts=True)
        measures["statuses"] = dict(zip(names.tolist(), counts.tolist(), strict=True))
        return measures


class KLMetrics:
    """KL to the start: the mean of log p - log p0 over the policy's own samples, nats per completion, and per token."""

    needs = frozenset({"log_probs"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        return nats(samples, "kl", numbers_of(samples, "log_prob") - numbers_of(samples, "log_prob_start"))


class EntropyMetrics:
    """Entropy of the policy in nats: the mean of -log p over its own samples, per completion and per token.

    Per completion it is an unbiased estimate of the cross-entropy from the sampling distribution to the policy's own
    (untempered, whole) law of completions of at most max_completion_length tokens. At temperature 1 and without top_p,
    top_k, min_p or a penalty the two laws are one, and it is the policy's entropy, the mean over prompts. `per token`
    is the ratio of the sums over all samples, EOS counted.
    """

    needs = frozenset({"own_log_probs"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        if "log_prob" in samples.column_names:
            log_probs = numbers_of(samples, "log_prob")
        else:  # the sums of what was recorded while generating
            rows = (row for chunk in samples.column("completion_logprobs").chunks for row in chunk.to_pylist())
            log_probs = np.array([math.nan if row is None else math.fsum(row) for row in rows], dtype=np.float64)
        return nats(samples, "entropy", -log_probs)


class PerplexityMetrics:
    """exp(-Σ log p / Σ tokens) over reference completions of held-out prompts, EOS counted, the interval over prompts.

    None where a completion is impossible under the policy, which makes it infinite. `references` counts the completions
    measured, left out (empty, or unfit for the model) and impossible.
    """

    needs = frozenset({"references"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        values, tokens = -numbers_of(samples, "reference_log_prob"), numbers_of(samples, "tokens")
        left_out, impossible = int(np.isnan(values).sum()), int(np.isposinf(values).sum())
        counts = {"measured": len(values) - left_out - impossible, "left_out": left_out, "impossible": impossible}
        rate = None if impossible else ratio_interval(values, tokens)
        if rate is None or max(rate["mean"], rate["high"] or 0.0) > MOST_NATS:
            return {"perplexity": None, "references": counts}
        low, high = (None if end is None else math.exp(end) for end in (rate["low"], rate["high"]))
        perplexity = Interval(mean=math.exp(rate["mean"]), low=low, high=high, n=rate["n"])  # exp keeps the order
        return {"perplexity": perplexity, "references": counts}


class TextMetrics:
    """Length, the share cut off, and how varied the words are: over all samples, and inside a prompt's group."""

    needs = frozenset({"text"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        words, groups = numbered(texts_of(samples)), prompt_numbers(samples)
        measures = word_measures(words) | {"similarity": interval(similarities(words, groups))}
        if "completion_ids" in samples.column_names:
            measures["completions/mean_length"] = interval(mean_by_prompt(groups, token_counts(samples)))
        if "finish" in samples.column_names:
            cut_off = [finish == "length" for finish in samples.column("finish").to_pylist()]
            measures["completions/clipped_ratio"] = float(np.mean(cut_off))
        return measures


class ValidityMetrics:
    """Share of invalid samples."""

    needs = frozenset({INVALID})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        count = samples.num_rows
        return {"invalid_ratio": (count - samples.column(INVALID).null_count) / count if count else None}


METRICS: dict[str, Metric] = {  # the built-in metrics
    "rewards": RewardMetrics(),
    "divergence": KLMetrics(),
    "entropy": EntropyMetrics(),
    "perplexity": PerplexityMetrics(),
    "text": TextMetrics(),
    "validity": ValidityMetrics(),
    "pixels": PixelMetrics(),
    "vectors": FeatureMetrics(),
}


def load_metrics(config: EvaluationConfig) -> dict[str, Metric]:
    """The user's own metrics by name. Raises ConfigError where one is not there, or is not whole."""
    metrics = {}
    for name, spec in zip(config.metric_names, config.metrics, strict=True):
        metric: Metric = load_extension(
            spec.spec,
            "evaluation.metrics",
            spec.options,
            f"evaluation.metrics, options of {name}",
            methods={"__call__": ("samples",)},
            attributes=("needs",),
        )
        if not isinstance(metric.needs, set | frozenset | tuple | list) or not set(metric.needs) <= NEEDS:
            raise ConfigError(
                f"evaluation.metrics: `needs` of {spec.spec} must be of {', '.join(sorted(NEEDS))}; got "
                f"{metric.needs!r}. {GUIDE}"
            )
        metrics[name] = metric
    return metrics


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


def best_of_curve(groups: IntArray, scores: FloatArray) -> dict[str, Any]:
    """For k = 1, 2, 4, … the reward of the best of k samples; a prompt counts for a k that its usable scores reach."""
    finite = np.isfinite(scores)
    order = np.argsort(groups[finite], kind="stable")
    sorted_scores = scores[finite][order]
    counts = np.bincount(groups[finite], minlength=int(groups.max(initial=-1)) + 1)
    starts = np.cumsum(counts) - counts
    ks = ks_up_to(int(counts.max(initial=0)))
    estimates = np.full((len(counts), len(ks)), np.nan)
    for n in np.unique(counts[counts > 0]):
        rows = np.flatnonzero(counts == n)
        reached = [k for k in ks if k <= n]
        table = sorted_scores[starts[rows][:, None] + np.arange(n)]
        estimates[rows, : len(reached)] = best_of_k_estimates(table, reached)
    return {str(k): interval(estimates[:, i]) for i, k in enumerate(ks)}


def nats(samples: pa.Table, name: str, values: FloatArray) -> dict[str, Any]:
    """The mean of (N,) nats of each completion, and per token where tokens are known."""
    groups = prompt_numbers(samples)
    measures: dict[str, Any] = {name: interval(mean_by_prompt(groups, values))}
    if "completion_ids" in samples.column_names:
        size = int(groups.max(initial=-1)) + 1
        above, below = (
            np.bincount(groups, weights=numbers, minlength=size).astype(np.float64)
            for numbers in (values, token_counts(samples))
        )
        measures[f"{name}_per_token"] = ratio_interval(above, below)
    return measures


def texts_of(samples: pa.Table) -> Iterator[str]:
    """The completions one after another, a chunk of the table in memory at a time."""
    for chunk in samples.column("completion").chunks:
        yield from chunk.to_pylist()


def token_counts(samples: pa.Table) -> FloatArray:
    """(N,) tokens of each completion."""
    counts = pc.list_value_length(samples.column("completion_ids")).to_numpy(zero_copy_only=False)
    return np.nan_to_num(np.asarray(counts, dtype=np.float64))


def finite(values: FloatArray) -> FloatArray:
    return values[np.isfinite(values)]


def deviation(values: FloatArray) -> float | None:
    usable_values = finite(values)
    return float(usable_values.std()) if len(usable_values) else None
