"""One RAFT round on a table of logits in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from raftune.config.selection import TopM
from raftune.selection import Candidates, select


class RaftIteration(TypedDict):
    """What raft_iteration returns.

    updated_logits: (n_prompts, V), a new array. mean_reward: over the selected. n_selected: counted with multiplicity.
    mean_reward_generated: over all candidates with a finite reward. Means over nothing are 0.
    """

    updated_logits: npt.NDArray[np.floating[Any]]
    mean_reward: float
    n_selected: int
    mean_reward_generated: float


def raft_iteration(
    policy_logits: npt.ArrayLike,
    prompts: Sequence[Any],
    reward_fn: Callable[[Any, int], float | None],
    n_candidates: int = 8,
    top_fraction: float = 0.25,
    lr: float = 1e-3,
    *,
    weighting: Literal["uniform", "reward"] = "uniform",
    rng: np.random.Generator | int | None = None,
) -> RaftIteration:
    """One ascent step on the log-likelihood of the best completions of each prompt, sampled from the policy itself.

    For each prompt: samples `n_candidates` completions from the softmax of its row of logits, with replacement; calls
    `reward_fn(prompt, completion)` once for each; keeps the m = max(1, floor(n_candidates · top_fraction)) best, ties
    to the earlier one. Then takes one full-batch step of size `lr` up the mean log-likelihood of those kept:

        row_i += lr · (q̂_i − p_i) / n_prompts        p_i the softmax of row i, q̂_i the frequencies of those kept

    Its expectation is lr · (q_i − p_i) / n_prompts with q_i = closed_forms.top_m_law(p_i, r_i, n_candidates, m). With
    weighting="reward" the gradient (e_y − p_i) of each kept completion is multiplied by its reward.

    policy_logits: (n_prompts, V) finite or −inf (a completion that is never sampled), never changed; integers become
    floats. A reward that is None, NaN or infinite is never kept, and a prompt without a finite one moves nothing. rng:
    a numpy Generator or a seed; None is random. Raises ValueError for arguments that break these rules.

    Source: Dong et al. 2023, arXiv 2304.06767, Algorithm 1, with one gradient step in place of a fine-tuning.
    """
    logits = np.asarray(policy_logits)
    if logits.ndim != 2 or logits.shape[0] != len(prompts) or logits.shape[1] == 0:
        raise ValueError(
            f"policy_logits must have shape (n_prompts, V), one row of at least one completion per prompt; "
            f"got {logits.shape} for {len(prompts)} prompts. Give each prompt its row."
        )
    if logits.dtype.kind not in "iuf":
        raise ValueError(f"policy_logits must be real numbers; got {logits.dtype}.")
    logits = logits if logits.dtype.kind == "f" else logits.astype(np.float64)
    if (np.isnan(logits) | (logits == np.inf)).any() or np.isneginf(logits).all(axis=1).any():
        raise ValueError(
            "policy_logits must be finite, or -inf for some completions of a row; got NaN, +inf or a row of -inf."
        )
    if not isinstance(n_candidates, int | np.integer) or n_candidates < 1:
        raise ValueError(f"n_candidates must be a whole number of at least 1; got {n_candidates}.")
    if not 0 < top_fraction <= 1:
        fix = f" It is a fraction, not a percentage: write {top_fraction / 100:g}." if 1 < top_fraction <= 100 else ""
        raise ValueError(f"top_fraction must be in (0, 1]; got {top_fraction:g}.{fix}")
    if not (np.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number of at least 0; got {lr}.")
    if weighting not in ("uniform", "reward"):
        raise ValueError(f'weighting must be "uniform" or "reward"; got {weighting!r}.')

    m = max(1, floor(n_candidates * top_fraction + 1e-9))  # 100 · 0.29 is 28.999…96 in floats, and means 29
    p_XV = np.exp(logits.astype(np.float64) - logits.astype(np.float64).max(axis=-1, keepdims=True))
    p_XV /= p_XV.sum(axis=-1, keepdims=True)
    uniform_XK = np.random.default_rng(rng).random((len(p_XV), n_candidates))
    sampled_XK = np.zeros(uniform_XK.shape, np.int64)
    rewards_XK = np.full(uniform_XK.shape, np.nan)
    for x, (prompt, p) in enumerate(zip(prompts, p_XV, strict=True)):
        cdf = np.cumsum(p)  # inverse CDF: a completion of probability 0 is never sampled
        sampled_XK[x] = np.searchsorted(cdf / cdf[-1], uniform_XK[x], side="right")
        for k, completion in enumerate(sampled_XK[x].tolist()):
            value = reward_fn(prompt, completion)
            rewards_XK[x, k] = np.nan if value is None else float(value)

    groups, ks = (index.ravel() for index in np.indices(rewards_XK.shape))
    unused = np.zeros(rewards_XK.size, np.int64)
    candidates = Candidates(groups, ks.astype(np.int32), rewards_XK.ravel(), unused, unused.astype(np.uint64))
    verdicts = select(candidates, TopM(m=m, all_equal="keep"), seed=0)  # the runs' own selection: one rule for ties
    kept_XK = (verdicts.weight > 0).reshape(rewards_XK.shape)

    gradient_XV = np.zeros_like(p_XV)  # of the mean over prompts of the mean over those kept of value · log p
    for x in np.flatnonzero(kept_XK.any(axis=1)).tolist():
        kept = kept_XK[x]
        values = (rewards_XK[x, kept] if weighting == "reward" else np.ones(kept.sum())) / kept.sum()
        np.add.at(gradient_XV[x], sampled_XK[x, kept], values)
        gradient_XV[x] -= values.sum() * p_XV[x]
    finite = rewards_XK[np.isfinite(rewards_XK)]
    return {
        "updated_logits": (logits + lr * (gradient_XV / max(1, len(p_XV)))).astype(logits.dtype),
        "mean_reward": float(rewards_XK[kept_XK].mean()) if kept_XK.any() else 0.0,
        "n_selected": int(kept_XK.sum()),
        "mean_reward_generated": float(finite.mean()) if finite.size else 0.0,
    }
