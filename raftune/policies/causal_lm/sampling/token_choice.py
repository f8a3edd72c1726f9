"""Parameters of generation, and the choice of tokens from logits and seeded noise.

The noise is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3). It is
counter-based: any step of any sample can be computed alone, in any order, in any batch.

Shapes: R rows, V the vocabulary, B blocks of it, S the tokens seen so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from raftune.arrays import FloatArray, IntArray, UInt64Array
from raftune.training.devices import upload

FinishReason = Literal["eos", "length", "stop"]
# The shared prefix by a forward of ours, or by the model's own; `generate`; `generate` with a row at a time.
BackendName = Literal["fused", "forked", "generate", "single"]
SHARED_PREFIX = ("fused", "forked")
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_Words = TypeVar("_Words", npt.NDArray[Any], Tensor)
_BLOCK = 64  # tokens


def philox4x32(counter: Sequence[_Words], key: Sequence[_Words]) -> tuple[_Words, _Words, _Words, _Words]:
    """Four pseudo-random 32-bit words for each (counter, key).

    `counter` is four and `key` two arrays of 32-bit words, of shapes that broadcast: in uint64 arrays, or in int64
    tensors of any device, whose products wrap around to the same bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
    return c0, c1, c2, c3


def _random_bits(seed: _Words, step: _Words) -> _Words:
    """53 bits; the seed is the key, the step the counter."""
    zero = step & 0
    high, low, _, _ = philox4x32((step & _LOW, step >> 32, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))
    return ((high << 21) ^ (low >> 11)) & ((1 << 53) - 1)


def uniforms(seeds: ArrayLike, steps: ArrayLike) -> FloatArray:
    """Numbers uniform on [0, 1) with 53 random bits, one for each (seed, step); the shapes broadcast.

    Seeds are integers of up to 64 bits, steps are at least 0. The seed is the key, the step the counter.
    """
    bits = _random_bits(np.asarray(seeds).astype(np.uint64), np.asarray(steps).astype(np.uint64))
    return np.asarray(bits * 2.0**-53, dtype=np.float64)


def uniforms_on(device: torch.device, seeds: UInt64Array, steps: IntArray) -> Tensor:
    """`uniforms`, computed on the device (or on the CPU where it has no float64) without waiting for it."""
    device = torch.device("cpu") if device.type == "mps" else device
    return _random_bits(upload(seeds.view(np.int64), device), upload(steps, device)).to(torch.float64) * 2.0**-53


def inverse_cdf(weights_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The token at which the cumulative weight first exceeds `uniform * total`; never one whose weight is zero.

    `weights_RV` are float32, at least 0, each row with a positive sum; `uniforms_R` lie in [0, 1). The search runs over
    sums of blocks first, then inside one block, both cumulated in double precision: a float32 cumulative sum rounds
    away tokens below 6e-8, and there are many of those in a vocabulary of 150,000.
    """
    rows, vocabulary = weights_RV.shape
    wide = torch.float32 if weights_RV.device.type == "mps" else torch.float64
    full = vocabulary // _BLOCK * _BLOCK  # the last block may be short
    sums = [weights_RV[:, :full].reshape(rows, -1, _BLOCK).sum(-1)] if full else []
    if full < vocabulary:
        sums.append(weights_RV[:, full:].sum(-1, keepdim=True))
    edges_RB = torch.cat(sums, dim=1).to(wide).cumsum(-1)
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


def _just_below(bound: Tensor) -> Tensor:
    return torch.nextafter(bound, torch.zeros_like(bound))


class GeneratedCompletion(NamedTuple):
    """One completion: its token ids, EOS included where it was generated, and why it ended.

    `logprobs` holds one number per id, in nats: the log-softmax of the raw logits, before temperature and every other
    warp. `finish` is `eos`, `stop` (a stop string was completed by the last id) or `length` (the limit, or the model's
    context, was reached).
    """

    ids: list[int]
    logprobs: list[float]
    finish: FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when a completion ends.

    `eos_ids` are all ids that end a completion; `pad_id` fills rows and may be any id of the vocabulary. `batch_size`
    is the number of rows alive at once. With `generation_kwargs`, `generate` samples.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_completion_length: int = 128
    stop_strings: tuple[str, ...] = ()
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    batch_size: int = 256

    @property
    def warps(self) -> bool:
        """True where a sampled token's distribution is not the softmax of logits over temperature alone."""
        cuts = self.top_p < 1 or self.top_k > 0 or self.min_p > 0
        return self.repetition_penalty != 1 or (cuts and self.temperature > 0)

    @property
    def needs_generate(self) -> str:
        """Which options only `generate` has, as a reason; empty where there are none."""
        options = [name for name, value in self.generation_kwargs.items() if (name, value) != ("use_cache", True)]
        return f"generation_kwargs {', '.join(sorted(options))} are generate's own" if options else ""


class TokenSampler:
    """Chooses each row's next token from its logits and its own uniform number.

    `needs_history` says whether the tokens seen so far must be given (the repetition penalty reads them).
    """

    def __init__(self, settings: SamplingParams) -> None:
        self.needs_history = settings.repetition_penalty != 1
        self._temperature = temperature = float(settings.temperature)
        self._warpers = LogitsProcessorList()  # as `generate` would apply them, without those that change nothing
        if not settings.warps:
            return
        if self.needs_history:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if temperature == 0:
            return
        if temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(temperature))
        if settings.top_k > 0:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(settings.top_p)))
        if settings.min_p > 0:
            self._warpers.append(MinPLogitsWarper(settings.min_p))

    def __call__(self, logits_RV: Tensor, uniforms_R: Tensor, seen_RS: Tensor | None) -> tuple[Tensor, Tensor]:
        """Token ids and their log-probabilities under the raw logits, both of shape (R,).

        Rows of `seen_RS` may be padded with any token of the same row: what was seen counts once.
        """
        logits_RV = logits_RV.float()
        if not self._warpers and self._temperature == 1:
            probs_RV = torch.softmax(logits_RV, dim=-1)
            tokens_R = inverse_cdf(probs_RV, uniforms_R)
            return tokens_R, probs_RV.gather(1, tokens_R[:, None])[:, 0].log()
        warped_RV = logits_RV
        if self._warpers:
            warped_RV = self._warpers(seen_RS, logits_RV.clone())
        elif self._temperature > 0:
            warped_RV = logits_RV / self._temperature
        if self._temperature == 0:
            tokens_R = warped_RV.argmax(-1)
        else:
            tokens_R = inverse_cdf(torch.softmax(warped_RV, dim=-1), uniforms_R)
        chosen_R = logits_RV.gather(1, tokens_R[:, None])[:, 0]
        return tokens_R, chosen_R - logits_RV.logsumexp(-1)
