"""Chooses tokens from logits and noise: warping, inverse-CDF sampling, log-probabilities.

Shapes: R rows, V the vocabulary, B blocks of it, S the tokens seen so far.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raftune.arrays import FloatArray
from raftune.policies.causal_lm.sampling.params import SamplingParams

_BLOCK = 64


def inverse_cdf(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The token at which the cumulative weight first exceeds `uniform * total`; never one whose weight is zero.

    `weights_RV` are float32, at least 0, each row with a positive sum; `uniforms_R` lie in [0, 1). The search runs over
    sums of blocks first, then inside one block, both cumulated in double precision: a float32 cumulative sum rounds
    away tokens below 6e-8, and there are many of those in a vocabulary of 150,000.
    """
    rows, vocabulary = weights_RV.shape
    wide = torch.float32 if weights_RV.device.type == "mps" else torch.float64
    edges_RB = _block_sums(weights_RV).to(wide).cumsum(-1)
    total_R1 = edges_RB[:, -1:]
    target_R1 = torch.minimum(uniforms_R.to(wide).to(total_R1.device)[:, None] * total_R1, _just_below(total_R1))
    block_R1 = torch.searchsorted(edges_RB, target_R1, right=True).clamp_(max=edges_RB.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, edges_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0)

    columns_RK = block_R1 * _BLOCK + torch.arange(_BLOCK, device=weights_RV.device)
    inside_RK = weights_RV.gather(1, columns_RK.clamp(max=vocabulary - 1)).to(wide)
    inner_RK = inside_RK.masked_fill_(columns_RK >= vocabulary, 0).cumsum(-1)
    rest_R1 = torch.minimum(target_R1 - before_R1, _just_below(inner_RK[:, -1:])).clamp_(min=0)
    offset_R1 = torch.searchsorted(inner_RK, rest_R1, right=True).clamp_(max=_BLOCK - 1)
    return (block_R1 * _BLOCK + offset_R1).clamp_(max=vocabulary - 1).reshape(rows)


def _block_sums(weights_RV: Tensor) -> Tensor:
    """Sums over consecutive blocks of the vocabulary; the last block may be short."""
    rows, vocabulary = weights_RV.shape
    whole = vocabulary // _BLOCK * _BLOCK
    sums = weights_RV[:, :whole].reshape(rows, -1, _BLOCK).sum(-1) if whole else weights_RV.new_zeros(rows, 0)
    if whole == vocabulary:
        return sums
    return torch.cat([sums, weights_RV[:, whole:].sum(-1, keepdim=True)], dim=1)


def _just_below(bound: Tensor) -> Tensor:
    return torch.nextafter(bound, torch.zeros_like(bound))


def warpers(settings: SamplingParams) -> LogitsProcessorList:
    """The processors that `generate` would apply, in its order, without those that would change nothing."""
    found = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature == 0:
        return found
    if settings.temperature != 1:
        found.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k > 0:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(float(settings.top_p)))
    if settings.min_p > 0:
        found.append(MinPLogitsWarper(settings.min_p))
    return found


class TokenSampler:
    """Chooses each row's next token from its logits and its own uniform number.

    `needs_history` says whether the tokens seen so far must be given (the repetition penalty reads them).
    """

    def __init__(self, settings: SamplingParams) -> None:
        self.needs_history = settings.repetition_penalty != 1
        self._temperature = float(settings.temperature)
        self._warpers = warpers(settings) if settings.warps else None

    def __call__(self, logits_RV: Tensor, uniforms_R: FloatArray, seen_RS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids and their log-probabilities under the raw logits, both of shape (R,).

        Rows of `seen_RS` may be padded with any token of the same row: what was seen counts once.
        """
        logits_RV = logits_RV.float()
        if self._warpers is None and self._temperature == 1:
            probs_RV = torch.softmax(logits_RV, dim=-1)
            tokens_R = inverse_cdf(probs_RV, torch.from_numpy(uniforms_R))
            return tokens_R, probs_RV.gather(1, tokens_R[:, None])[:, 0].log()
        tokens_R = self._pick(self._warped(logits_RV, seen_RS), uniforms_R)
        chosen_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
        return tokens_R, chosen_R - logits_RV.logsumexp(-1)

    def _warped(self, logits_RV: Tensor, seen_RS: Tensor | None) -> Tensor:
        if self._warpers is not None:
            warped_RV: Tensor = self._warpers(seen_RS, logits_RV.clone())
            return warped_RV
        return logits_RV / self._temperature if self._temperature > 0 else logits_RV

    def _pick(self, scores_RV: Tensor, uniforms_R: FloatArray) -> Tensor:
        if self._temperature == 0:
            return scores_RV.argmax(-1)
        return inverse_cdf(torch.softmax(scores_RV, dim=-1), torch.from_numpy(uniforms_R))
