"""One RAFT round on a table of logits in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from raftune.arrays import BoolArray, FloatArray, IntArray
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
    """One ascent step on the log-likelihood of the best answers of each prompt, generated from the policy itself.

    For each prompt: draws `n_candidates` answers from the softmax of its row of logits, with replacement; asks
    `reward_fn(prompt, answer)` once for each; keeps the m = max(1, floor(n_candidates · top_fraction)) best, ties to
    the earlier draw. Then takes one full-batch step of size `lr` up the mean log-likelihood of what was kept:

        row_i += lr · (q̂_i − p_i) / n_prompts        p_i the softmax of row i, q̂_i the frequencies of what was kept

    Its expectation is lr · (q_i − p_i) / n_prompts with q_i = closed_forms.top_m_law(p_i, r_i, n_candidates, m). With
    weighting="reward" each kept answer's gradient (e_y − p_i) is multiplied by its reward.

    policy_logits: (n_prompts, V) finite or −inf (an answer that is never generated), never changed; integers become
    floats. A reward that is None, NaN or infinite is never kept, and a prompt without a finite one moves nothing. rng:
    a numpy Generator or a seed; None draws anew each time. Raises ValueError for arguments that break these rules.

    Source: Dong et al. 2023, arXiv 2304.06767, Algorithm 1, with one gradient step in place of a fine-tuning.
    """
    logits = _checked_logits(policy_logits, len(prompts))
    m = _checked_count(n_candidates, top_fraction)
    _check_step(lr, weighting)
    p_XV = _softmax(logits.astype(np.float64))
    answers_XK = _draw(p_XV, n_candidates, np.random.default_rng(rng))
    rewards_XK = _rewards(prompts, answers_XK, reward_fn)
    kept_XK = _kept(rewards_XK, m)
    values_XK = rewards_XK if weighting == "reward" else np.ones_like(rewards_XK)
    step_XV = lr * _gradient(p_XV, answers_XK, kept_XK, values_XK)
    return {
        "updated_logits": (logits + step_XV).astype(logits.dtype),
        "mean_reward": _mean(rewards_XK[kept_XK]),
        "n_selected": int(kept_XK.sum()),
        "mean_reward_generated": _mean(rewards_XK[np.isfinite(rewards_XK)]),
    }


def _checked_logits(policy_logits: npt.ArrayLike, n_prompts: int) -> npt.NDArray[np.floating[Any]]:
    logits = np.asarray(policy_logits)
    if logits.ndim != 2 or logits.shape[0] != n_prompts or logits.shape[1] == 0:
        raise ValueError(
            f"policy_logits must have shape (n_prompts, V), one row of at least one answer per prompt; "
            f"got {logits.shape} for {n_prompts} prompts. Give each prompt its row."
        )
    if logits.dtype.kind not in "iuf":
        raise ValueError(f"policy_logits must be real numbers; got {logits.dtype}.")
    floats = logits if logits.dtype.kind == "f" else logits.astype(np.float64)
    bad = np.isnan(floats) | (floats == np.inf)
    if bad.any() or np.isneginf(floats).all(axis=1).any():
        raise ValueError(
            "policy_logits must be finite, or -inf for some answers of a row; got NaN, +inf or a row of -inf."
        )
    return floats


def _checked_count(n_candidates: int, top_fraction: float) -> int:
    """How many of n_candidates are kept. 100 · 0.29 is 28.999…96 in floats, and means 29."""
    if not isinstance(n_candidates, int | np.integer) or n_candidates < 1:
        raise ValueError(f"n_candidates must be a whole number of at least 1; got {n_candidates}.")
    if not 0 < top_fraction <= 1:
        fix = f" It is a fraction, not a percentage: write {top_fraction / 100:g}." if 1 < top_fraction <= 100 else ""
        raise ValueError(f"top_fraction must be in (0, 1]; got {top_fraction:g}.{fix}")
    return max(1, floor(n_candidates * top_fraction + 1e-9))


def _check_step(lr: float, weighting: str) -> None:
    if not (np.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be a finite number of at least 0; got {lr}.")
    if weighting not in ("uniform", "reward"):
        raise ValueError(f'weighting must be "uniform" or "reward"; got {weighting!r}.')


def _softmax(logits: FloatArray) -> FloatArray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: FloatArray = shifted / shifted.sum(axis=-1, keepdims=True)
    return probabilities


def _draw(p_XV: FloatArray, k: int, rng: np.random.Generator) -> IntArray:
    """(X, K) independent answers of each row by inverse CDF; an answer of probability 0 is never generated."""
    uniform = rng.random((len(p_XV), k))
    answers = np.zeros((len(p_XV), k), np.int64)
    for x, p in enumerate(p_XV):
        cdf = np.cumsum(p)
        answers[x] = np.searchsorted(cdf / cdf[-1], uniform[x], side="right")
    return answers


def _rewards(prompts: Sequence[Any], answers_XK: IntArray, reward_fn: Callable[[Any, int], float | None]) -> FloatArray:
    """(X, K) one call each, prompt by prompt in the order of generating; None becomes NaN."""
    rewards = np.full(answers_XK.shape, np.nan)
    for x, prompt in enumerate(prompts):
        for k, answer in enumerate(answers_XK[x].tolist()):
            value = reward_fn(prompt, answer)
            rewards[x, k] = np.nan if value is None else float(value)
    return rewards


def _kept(rewards_XK: FloatArray, m: int) -> BoolArray:
    """(X, K) True for the m best of each row. The house's own selection decides, so that there is one rule for ties."""
    x, k = np.indices(rewards_XK.shape)
    unused = np.zeros(rewards_XK.size, np.int64)
    candidates = Candidates(x.ravel(), k.ravel().astype(np.int32), rewards_XK.ravel(), unused, unused.astype(np.uint64))
    verdicts = select(candidates, TopM(m=m, all_equal="keep"), seed=0)
    return (verdicts.weight > 0).reshape(rewards_XK.shape)


def _gradient(p_XV: FloatArray, answers_XK: IntArray, kept_XK: BoolArray, values_XK: FloatArray) -> FloatArray:
    """(X, V) of the mean over prompts of the mean over what was kept of value · log p(answer), in the logits."""
    gradient = np.zeros_like(p_XV)
    for x in np.flatnonzero(kept_XK.any(axis=1)):
        mine = kept_XK[x]
        values = values_XK[x, mine] / mine.sum()
        np.add.at(gradient[x], answers_XK[x, mine], values)
        gradient[x] -= values.sum() * p_XV[x]
    return gradient / max(1, len(p_XV))


def _mean(values: FloatArray) -> float:
    return float(values.mean()) if values.size else 0.0
