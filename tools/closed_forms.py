"""What selection does to a categorical policy, exactly: the mathematics that the tests hold the algorithm to.

A policy is a vector p (V,) of probabilities over V completions; r (V,) are their rewards, finite. Levels are the
distinct rewards, ascending; F(c) is the mass with reward ≤ c, F⁻(c) the mass below c, P_c the mass at c. All K samples
are independent samples of one p. Ties are broken by position, which is fair: it knows nothing of content. Logarithms
are natural: divergences are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from raftune.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class RewardLevels:
    """The distinct rewards of a policy: J values ascending, their masses (sum 1), and each completion's level (V,)."""

    value: FloatArray
    mass: FloatArray
    of: IntArray

    @property
    def at_most(self) -> FloatArray:
        """(J,) F: the mass of this level and all below; exactly 1 for the last."""
        below = np.cumsum(self.mass)
        share: FloatArray = np.minimum(below / below[-1], 1.0)
        return share

    @property
    def at_least(self) -> FloatArray:
        """(J,) the mass of this level and all above; exactly 1 for the first."""
        above = np.cumsum(self.mass[::-1])[::-1]
        share: FloatArray = np.minimum(above / above[0], 1.0)
        return share


def levels(p: npt.ArrayLike, r: npt.ArrayLike, tolerance: float = 0.0) -> RewardLevels:
    """The reward levels that p can reach; rewards that follow one another within `tolerance` are one level.

    The tolerance is for rewards that are equal in mathematics but not in floats: without it rounding breaks their ties
    by content. A completion of probability 0 opens no level; its `of` is meaningless.
    """
    p, r = np.asarray(p, np.float64), np.asarray(r, np.float64)
    if p.ndim != 1 or p.shape != r.shape:
        raise ValueError(f"p and r must be vectors of one length; got shapes {p.shape} and {r.shape}.")
    if not np.isfinite(r[p > 0]).all() or p.min() < 0 or not 0 < p.sum() < np.inf:
        raise ValueError("p must be probabilities, and r finite wherever p > 0.")
    distinct, inverse = np.unique(r[p > 0], return_inverse=True)
    index = np.concatenate(([0], np.cumsum(np.diff(distinct) > tolerance)))
    of = np.zeros(len(p), np.int64)
    of[p > 0] = index[inverse]
    first = np.searchsorted(index, np.arange(index[-1] + 1))
    mass = np.bincount(of, weights=p) / p.sum()
    return RewardLevels(distinct[first], mass, of)


def _spread(p: npt.ArrayLike, by: RewardLevels, mass: FloatArray) -> FloatArray:
    """(V,) the law that gives each level its new mass and shares it inside the level in proportion to p."""
    q = np.asarray(p, np.float64) * (mass / by.mass)[by.of]
    normalised: FloatArray = q / q.sum()
    return normalised


# -- best of K -------------------------------------------------------------------------------------------------------


def best_of_k_law(p: npt.ArrayLike, r: npt.ArrayLike, k: int, tolerance: float = 0.0) -> FloatArray:
    """(V,) the distribution of the best of k samples: q(y) = p(y)/P_r(y) · (F(r(y))^k − F⁻(r(y))^k)."""
    by = levels(p, r, tolerance)
    with np.errstate(divide="ignore", under="ignore"):  # log1p(−1) where nothing lies below: the mass is F^k
        # F^k − F⁻^k = F^k · (1 − (1 − P/F)^k), written so that a small P/F is not lost in the difference.
        share = np.minimum(by.mass / by.at_most, 1.0)
        mass = np.exp(k * np.log(by.at_most)) * -np.expm1(k * np.log1p(-share))
    return _spread(p, by, mass)


def best_of_k_rounds(p: npt.ArrayLike, r: npt.ArrayLike, k: int, rounds: int) -> FloatArray:
    """(V,) the policy after `rounds` rounds of best of k, each fitted exactly: best of k**rounds from the start."""
    return best_of_k_law(p, r, k**rounds)


def rounds_variance(mass_at_most: npt.ArrayLike, k: int, rounds: int, winners: int) -> FloatArray:
    """Var F_T after T rounds that are each fitted to the frequencies of `winners` samples, to first order in 1/winners.

    mass_at_most: F of a reward level at the start. It is Σ_t (k^{T−t}·F_T/F_t)²·F_t(1−F_t)/winners over t = 1..T, with
    F_t = F^{k^t}: each round's sampling error is amplified by all that follow. The mean is off by O(1/winners) too.
    """
    start = np.asarray(mass_at_most, np.float64)
    exact = [start ** (k**t) for t in range(rounds + 1)]
    terms = [
        (k ** (rounds - t) * exact[rounds] / exact[t]) ** 2 * exact[t] * (1 - exact[t]) / winners
        for t in range(1, rounds + 1)
    ]
    variance: FloatArray = np.sum(terms, axis=0)
    return variance


def expected_best(p: npt.ArrayLike, r: npt.ArrayLike, k: int) -> float:
    """E max over k samples: v_max − Σ_j (v_{j+1} − v_j)·F(v_j)^k."""
    by = levels(p, r)
    return float(by.value[-1] - np.sum(np.diff(by.value) * by.at_most[:-1] ** k))


def expected_best_bound(p: npt.ArrayLike, r: npt.ArrayLike, k: int) -> float:
    """E r + sqrt(B²/2 · log k), B the range of the rewards: never below expected_best, and equal to it at k = 1."""
    by = levels(p, r)
    width = by.value[-1] - by.value[0]
    return float(by.mass @ by.value + width * np.sqrt(np.log(k) / 2))


def top_m_law(p: npt.ArrayLike, r: npt.ArrayLike, k: int, m: int) -> FloatArray:
    """(V,) the distribution of one of the m best of k samples, picked at random; the m of a group are dependent.

    q(y) = p(y)/P_r(y) · [G(S≥) − G(S>)]/m with G(c) = E min(m, Bin(k, c)), S the mass of at least or more than r(y).
    """
    by = levels(p, r)
    expected_from = [_expected_min(m, k, float(c)) for c in (*by.at_least, 0.0)]
    return _spread(p, by, -np.diff(expected_from) / m)


def _expected_min(m: int, k: int, c: float) -> float:
    return sum(min(m, j) * comb(k, j) * c**j * (1 - c) ** (k - j) for j in range(1, k + 1))


# -- divergence ------------------------------------------------------------------------------------------------------


def kl(q: npt.ArrayLike, p: npt.ArrayLike) -> float:
    """KL(q ‖ p) in nats; infinite where q has mass that p has not."""
    q, p = np.asarray(q, np.float64), np.asarray(p, np.float64)
    held = q > 0
    if (p[held] == 0).any():
        return float("inf")
    return float(np.sum(q[held] * np.log(q[held] / p[held])))


def best_of_k_kl_bound(p: npt.ArrayLike, r: npt.ArrayLike, k: int) -> float:
    """min(log k − (k−1)/k, −log P(v_max)): an upper bound of KL(best of k ‖ p), not its value."""
    return float(min(np.log(k) - (k - 1) / k, -np.log(levels(p, r).mass[-1])))


def win_rate(q: npt.ArrayLike, p: npt.ArrayLike, r: npt.ArrayLike) -> float:
    """P(a sample of q scores above an independent sample of p), ties counted ½; for q = best of k at most k/(k+1)."""
    q, p, r = (np.asarray(x, np.float64) for x in (q, p, r))
    wins = (r[:, None] > r[None, :]) + 0.5 * (r[:, None] == r[None, :])
    return float(q @ wins @ p)


# -- other rules -----------------------------------------------------------------------------------------------------


def threshold_law(p: npt.ArrayLike, r: npt.ArrayLike, threshold: float) -> FloatArray:
    """(V,) p restricted to rewards ≥ threshold: idempotent, and its KL from p is −log P(r ≥ threshold)."""
    q = np.asarray(p, np.float64) * (np.asarray(r) >= threshold)
    if not q.sum() > 0:
        raise ValueError(f"no completion of positive probability reaches the threshold {threshold:g}.")
    normalised: FloatArray = q / q.sum()
    return normalised


def global_shares(p: npt.ArrayLike, r: npt.ArrayLike, n: npt.ArrayLike, keep_fraction: float) -> FloatArray:
    """(X,) the share of each prompt in what the best keep_fraction of all samples holds, in the limit of many samples.

    p, r: (X, V), one policy a prompt; n: (X,) samples of each. w_x ∝ n_x·[P_x(r > τ) + ρ·P_x(r = τ)] with τ the cut and
    ρ the share of the samples at the cut that are kept, one ρ for all prompts: ties are broken fairly.
    """
    p, r, n = (np.asarray(x, np.float64) for x in (p, r, n))
    pooled = levels((p * (n / n.sum())[:, None]).ravel(), r.ravel())
    cut = int(np.flatnonzero(pooled.at_least >= keep_fraction - 1e-12)[-1])
    above = pooled.at_least[cut] - pooled.mass[cut]
    rho = min(1.0, (keep_fraction - above) / pooled.mass[cut])
    tau = pooled.value[cut]
    kept = n * np.sum(p * ((r > tau) + rho * (r == tau)), axis=1)
    shares: FloatArray = kept / kept.sum()
    return shares


# -- rounds without selection, and with a penalty --------------------------------------------------------------------


def temperature_law(p: npt.ArrayLike, temperature: float, rounds: int = 1) -> FloatArray:
    """(V,) p^{(1/temperature)^rounds}/Z: the policy after rounds of generating at this temperature and fitting, K =
    1.
    """
    with np.errstate(divide="ignore"):
        log_q = np.log(np.asarray(p, np.float64)) * temperature**-rounds
    q = np.exp(log_q - log_q.max())
    normalised: FloatArray = q / q.sum()
    return normalised


def regularised_target(start: npt.ArrayLike, r: npt.ArrayLike, beta: float) -> FloatArray:
    """(V,) start·e^{r/beta}/Z: where r − beta·log(p/start) is constant, the only fixed point of full support."""
    with np.errstate(divide="ignore"):
        log_q = np.log(np.asarray(start, np.float64)) + np.asarray(r, np.float64) / beta
    q = np.exp(log_q - log_q.max())
    normalised: FloatArray = q / q.sum()
    return normalised


def regularised_scores(p: npt.ArrayLike, start: npt.ArrayLike, r: npt.ArrayLike, beta: float) -> FloatArray:
    """(V,) r − beta·log(p/start): what a KL-regularised round ranks by."""
    with np.errstate(divide="ignore"):  # a completion that p never samples is never ranked
        log_p = np.log(np.asarray(p, np.float64))
    scores: FloatArray = np.asarray(r, np.float64) - beta * (log_p - np.log(np.asarray(start, np.float64)))
    return scores


def regularised_round(
    p: npt.ArrayLike, start: npt.ArrayLike, r: npt.ArrayLike, *, beta: float, k: int, step: float = 1.0
) -> FloatArray:
    """(V,) p moved by `step` towards the best of k under regularised_scores; a step of 1 is a full fit, and oscillates.

    At the target all scores tie in mathematics and none in floats: scores within 1e-9 count as tied.
    """
    best = best_of_k_law(p, regularised_scores(p, start, r, beta), k, tolerance=1e-9)
    moved: FloatArray = (1 - step) * np.asarray(p, np.float64) + step * best
    return moved


# -- gradients and allocation ----------------------------------------------------------------------------------------


def log_mass_gradient(p: npt.ArrayLike, members: npt.ArrayLike) -> FloatArray:
    """(V,) the gradient, in the logits of p, of the log of the mass of `members` (V,), true or false."""
    p = np.asarray(p, np.float64)
    inside = p * np.asarray(members, np.bool_)
    gradient: FloatArray = inside / inside.sum() - p
    return gradient


def allocation(gradient_norms: npt.ArrayLike, acceptance: npt.ArrayLike, total: float) -> FloatArray:
    """(X,) the samples of each prompt, summing to `total`, that make Σ G²/(s·n) least: n ∝ G/√s."""
    g, s = np.asarray(gradient_norms, np.float64), np.asarray(acceptance, np.float64)
    if not (s > 0).all():
        raise ValueError("an acceptance rate of 0 asks for infinitely many samples: leave such prompts out.")
    share = g / np.sqrt(s)
    n: FloatArray = total * share / share.sum()
    return n


def allocation_value(gradient_norms: npt.ArrayLike, acceptance: npt.ArrayLike, n: npt.ArrayLike) -> float:
    """Σ G²/(s·n), the variance that an allocation leaves; (Σ G/√s)²/Σn at the best one."""
    g, s, n = (np.asarray(x, np.float64) for x in (gradient_norms, acceptance, n))
    sampled = g > 0
    return float(np.sum(g[sampled] ** 2 / (s[sampled] * n[sampled])))
