"""State of unfinished completions: noise, chosen tokens, and the end of each row.

Both backends (shared prefix, `generate`) pass their logits here, so they choose, record and end alike. A *row* is a
sample by its flat number: samples are counted prompt by prompt, ragged groups included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raftune.arrays import BoolArray, IntArray
from raftune.errors import DataError, ModelError
from raftune.policies.causal_lm.sampling.params import FinishReason, GeneratedCompletion, SamplingParams
from raftune.policies.causal_lm.sampling.rng import uniforms
from raftune.policies.causal_lm.sampling.token_choice import TokenSampler

_ALIVE, _EOS, _STOP, _LENGTH = range(4)
_FINISH: dict[int, FinishReason] = {_EOS: "eos", _STOP: "stop", _LENGTH: "length"}
_TOKENS_A_CHARACTER = 4  # bytes of the longest UTF-8 character: a byte-level token may hold one of them


class StopStrings:
    """Tells which token completes a stop string.

    Only tokens whose text shares the last character of a stop string (or is not a whole character) can complete one;
    for all others nothing is decoded. The text is that of the completion, special tokens included; the prompt's end
    never counts.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = tuple(texts)
        self._window = _TOKENS_A_CHARACTER * (max(map(len, texts), default=0) + 2)
        self._may_end: dict[int, bool] = {}

    def ends(self, ids: NDArray[np.int32]) -> bool:
        """True if the last of `ids`, a whole completion so far, completes a stop string."""
        if not self._texts or not self._can_complete(int(ids[-1])):
            return False
        # The end alone is cheap to read; only what is found there is looked for in the whole text.
        return self._holds_one(ids[-self._window :]) and self._holds_one(ids)

    def _holds_one(self, ids: NDArray[np.int32]) -> bool:
        text = self._decode(ids)
        return any(stop in text for stop in self._texts)

    def _can_complete(self, token: int) -> bool:
        known = self._may_end.get(token)
        if known is None:
            text = self._decode(np.array([token, token]))  # twice: some decoders strip a leading space
            known = self._may_end[token] = "\ufffd" in text or any(stop[-1] in text for stop in self._texts)
        return known

    def _decode(self, ids: NDArray[Any]) -> str:
        text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


class CompletionBatch:
    """Every completion of a sample, as far as it has come.

    `limits` holds the most tokens that each row may have: `max_completion_length`, or what the model's context of
    `context` tokens leaves after the prompt. Raises DataError for a prompt that is empty or fills the context.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        settings: SamplingParams,
        context: int | None,
    ) -> None:
        self.prompts = [list(prompt) for prompt in prompts]
        self.settings = settings
        self.counts: IntArray = np.array([len(group) for group in seeds], dtype=np.int64)
        self.prompt_of: IntArray = np.repeat(np.arange(len(prompts)), self.counts)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        self.limits: IntArray = _limits(lengths, settings.max_completion_length, context)[self.prompt_of]
        self._seeds = np.array([seed for group in seeds for seed in group], dtype=np.uint64)
        self._stops = StopStrings(tokenizer, settings.stop_strings)
        self._choose = TokenSampler(settings)
        rows, width = len(self._seeds), int(self.limits.max(initial=0))
        self._ids = np.zeros((rows, width), dtype=np.int32)
        self._logprobs = np.zeros((rows, width), dtype=np.float32)
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._finish = np.full(rows, _ALIVE, dtype=np.int8)
        self._eos = np.array(settings.eos_ids, dtype=np.int64)
        self._padded = _left_padded(self.prompts) if self._choose.needs_history else None

    @property
    def rows(self) -> int:
        """How many completions are generated."""
        return len(self._seeds)

    @property
    def ended(self) -> int:
        """How many are complete."""
        return int(np.count_nonzero(self._finish))

    def groups(self) -> list[IntArray]:
        """The rows of each prompt."""
        return np.split(np.arange(len(self._seeds)), np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def seed(self, row: int) -> int:
        """The row's seed, as torch's global generator takes it."""
        return int(self._seeds[row] & np.uint64(2**63 - 1))

    def extend(self, rows: IntArray, logits: Tensor) -> tuple[Tensor, BoolArray]:
        """Chooses and records the next token of each row; returns the tokens and which rows have ended with them.

        `logits` has shape (rows, vocabulary). Raises ModelError where they are not numbers.
        """
        noise = uniforms(self._seeds[rows], self._lengths[rows])
        tokens, logprobs = self._choose(logits, noise, self._seen(rows, logits.device))
        self._write(rows, tokens.cpu().numpy(), logprobs.cpu().numpy())
        return tokens, self._finish[rows] != _ALIVE

    def record(self, row: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Takes over a completion that was generated elsewhere, up to where it ends by our rules."""
        for token, logprob in zip(ids, logprobs, strict=True):
            self._write(np.array([row]), np.array([token]), np.array([logprob], dtype=np.float32))
            if self._finish[row] != _ALIVE:
                return
        self._finish[row] = _LENGTH

    def drawn(self) -> list[list[GeneratedCompletion]]:
        """The finished completions, prompt by prompt."""
        return [[self._drawn(int(row)) for row in rows] for rows in self.groups()]

    def state(self) -> dict[str, Tensor]:
        """How far every completion has come: what changes while generating."""
        arrays = {"ids": self._ids, "logprobs": self._logprobs, "lengths": self._lengths, "finish": self._finish}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts every completion to where it was when `state` was taken."""
        self._ids, self._logprobs = state["ids"].numpy().copy(), state["logprobs"].numpy().copy()
        self._lengths, self._finish = state["lengths"].numpy().copy(), state["finish"].numpy().copy()

    def _drawn(self, row: int) -> GeneratedCompletion:
        length = self._lengths[row]
        ids, logprobs = self._ids[row, :length].tolist(), self._logprobs[row, :length].tolist()
        return GeneratedCompletion(ids, logprobs, _FINISH[int(self._finish[row])])

    def _write(self, rows: IntArray, tokens: NDArray[Any], logprobs: NDArray[Any]) -> None:
        if np.isnan(logprobs).any():
            raise ModelError(
                "the model's logits must be numbers; got NaN or inf while generating. Its weights are damaged, or its "
                "dtype overflows: load it with dtype float32 or bfloat16, or take another model."
            )
        at = self._lengths[rows]
        self._ids[rows, at] = tokens
        self._logprobs[rows, at] = logprobs
        self._lengths[rows] = at + 1
        self._mark_ends(rows, tokens)

    def _mark_ends(self, rows: IntArray, tokens: NDArray[Any]) -> None:
        """Writes down which rows end here: an EOS counts before a stop string, and that before the limit."""
        finish = np.where(self._lengths[rows] >= self.limits[rows], _LENGTH, _ALIVE).astype(np.int8)
        if self.settings.stop_strings:
            stopped = [self._stops.ends(self._ids[row, : self._lengths[row]]) for row in rows]
            finish[np.array(stopped, dtype=bool)] = _STOP
        finish[np.isin(tokens, self._eos)] = _EOS
        self._finish[rows] = finish

    def _seen(self, rows: IntArray, device: torch.device) -> Tensor | None:
        """Prompt and completion of each row, filled up with tokens of the same row; None where nobody asks for them."""
        if self._padded is None:
            return None
        prompts = self._padded[self.prompt_of[rows]]
        own = self._ids[rows, : int(self._lengths[rows].max())].astype(np.int64)
        unwritten = np.arange(own.shape[1]) >= self._lengths[rows][:, None]
        own = np.where(unwritten, prompts[:, -1:], own)
        return torch.from_numpy(np.concatenate([prompts, own], axis=1)).to(device)


def _limits(lengths: IntArray, wanted: int, context: int | None) -> IntArray:
    """Tokens that may follow each prompt: at most `wanted`, and no more than the context holds."""
    if (lengths == 0).any():
        raise DataError(
            f"a prompt must hold at least one token; prompt {int(np.argmin(lengths))} of this batch is empty. "
            "Remove it, or put a beginning-of-sequence token before it."
        )
    if context is None:
        return np.full(len(lengths), wanted, dtype=np.int64)
    if (lengths >= context).any():
        worst = int(np.argmax(lengths))
        raise DataError(
            f"a prompt must be shorter than the model's context of {context} tokens, or nothing can follow it; prompt "
            f"{worst} of this batch has {lengths[worst]}. Shorten it, or take a model with a longer context."
        )
    return np.minimum(wanted, context - lengths).astype(np.int64)


def _left_padded(prompts: Sequence[Sequence[int]]) -> IntArray:
    """Prompts of one width, each filled up on the left with its own first token."""
    width = max(map(len, prompts), default=0)
    return np.array([[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts], dtype=np.int64)
