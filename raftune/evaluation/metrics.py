"""What is measured of one round's policy: pure functions of its held-out samples."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raftune.evaluation.best_of import best_of_k_estimates
from raftune.evaluation.interval import interval, mean_by_prompt
from raftune.protocols import Metric

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Rewards:
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


class Divergence:
    """KL to the start, nats per answer: the mean of log p - log p0 over the policy's own samples."""

    needs = frozenset({"log_probs"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        ratio = (_column(samples, "log_prob") - _column(samples, "log_prob_start")).astype(np.float64)
        return {"kl": interval(mean_by_prompt(prompt_numbers(samples), ratio))}


class Text:
    """Length, the share cut off, and how varied the words are."""

    needs = frozenset({"text"})

    def __call__(self, samples: pa.Table) -> dict[str, Any]:
        texts = samples.column("completion").to_pylist()
        found: dict[str, Any] = {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}
        groups = prompt_numbers(samples)
        if "completion_ids" in samples.column_names:
            lengths = np.array(
                [len(ids or ()) for ids in samples.column("completion_ids").to_pylist()], dtype=np.float64
            )
            found["completions/mean_length"] = interval(mean_by_prompt(groups, lengths))
        if "finish" in samples.column_names:
            found["completions/clipped_ratio"] = float(
                np.mean([f == "length" for f in samples.column("finish").to_pylist()])
            )
        return found


METRICS: tuple[Metric, ...] = (Rewards(), Divergence(), Text())


def prompt_numbers(samples: pa.Table) -> Ints:
    """For each row the number of its prompt, in order of appearance."""
    codes = samples.column("prompt_id").combine_chunks().dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    return np.asarray(codes.indices.to_numpy(), dtype=np.int64)


def usable(samples: pa.Table, column: str, status: str) -> Floats:
    """The column's values, NaN where the status is not ok."""
    values = _column(samples, column)
    ok = np.array([s == "ok" for s in samples.column(status).to_pylist()])
    return np.where(ok, values, np.nan)


def best_of_curve(groups: Ints, scores: Floats) -> dict[str, Any]:
    """For k = 1, 2, 4, … the reward of the best of k draws; prompts with fewer usable scores are left out of that k."""
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


def share_without_spread(groups: Ints, scores: Floats) -> float:
    """The share of prompts whose usable scores are all equal: nothing can be learned from ranking these."""
    spreads = [np.ptp(s) for g in range(int(groups.max(initial=-1)) + 1) if len(s := _finite(scores[groups == g]))]
    return float(np.mean([spread == 0 for spread in spreads])) if spreads else float("nan")


def distinct(texts: list[str], n: int) -> float | None:
    """Distinct n-grams over all n-grams, words in lower case; None where there is none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _column(samples: pa.Table, name: str) -> Floats:
    return np.asarray(samples.column(name).to_numpy(zero_copy_only=False), dtype=np.float64)


def _std(values: Floats) -> float | None:
    finite = _finite(values)
    return float(finite.std()) if len(finite) else None
