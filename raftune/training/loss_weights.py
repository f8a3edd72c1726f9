"""Loss coefficients for each `loss_normalization`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from raftune.arrays import FloatArray

Normalization = Literal["token", "sample", "prompt"]


def coefficients(
    weights: FloatArray, tokens: Sequence[int], prompts: Sequence[str], normalization: Normalization, step: int
) -> FloatArray:
    """(N,) what each token of a row is multiplied by, so that an average step minimises the named mean.

    The mean is over all rows of the fit, not over those that happen to share a step: with steps of like length, a mean
    within the step would give each step the same weight, and so turn "token" into "sample". `step`: rows in a step. A
    token of an image is one element of its latent, and its loss the squared error there.

    token:  sum_i w_i nll_i / sum_i w_i T_i                                every token weighs the same
    sample: sum_i w_i (nll_i / T_i) / sum_i w_i                            every sample weighs the same
    prompt: mean over prompts x of sum_{i in x} w_i (nll_i / T_i) / sum_{i in x} w_i    every prompt weighs the same
    """
    lengths = np.asarray(tokens, dtype=np.float64)
    if normalization == "token":
        shares, total = weights, float(weights @ lengths)
    elif normalization == "sample":
        shares, total = weights / lengths, float(weights.sum())
    else:
        _, owner = np.unique(np.asarray(prompts), return_inverse=True)
        of_prompt = np.bincount(owner, weights=weights)
        shares, total = weights / of_prompt[owner] / lengths, float(len(of_prompt))
    steps_in_all_rows = max(1.0, len(weights) / step)
    return np.asarray(shares * steps_in_all_rows / total, dtype=np.float64)
