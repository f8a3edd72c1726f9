"""State of unfinished completions: noise, chosen tokens, and the end of each row.

Both backends (shared prefix, `generate`) pass their logits here, so they choose, record and end alike. A *row* is a
sample by its flat number: samples are counted prompt by prompt, ragged groups included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raftune.arrays import BoolArray, IntArray
from raftune.errors import DataError, ModelError
from raftune.policies.causal_lm.sampling.token_choice import (
    FinishReason,
    GeneratedCompletion,
    SamplingParams,
    TokenSampler,
    uniforms_on,
)
from raftune.training.devices import upload

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
        if not self._texts:
            return False
        token = int(ids[-1])
        if token not in self._may_end:
            text = self._decode(np.array([token, token]))  # twice: some decoders strip a leading space
            self._may_end[token] = "\ufffd" in text or any(stop[-1] in text for stop in self._texts)
        if not self._may_end[token]:
            return False
        for part in (ids[-self._window :], ids):  # the end alone is cheap: the whole text only after a match there
            text = self._decode(part)
            if not any(stop in text for stop in self._texts):
                return False
        return True

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
        if (lengths == 0).any():
            raise DataError(
                f"a prompt must hold at least one token; prompt {int(np.argmin(lengths))} of this batch is empty. "
                "Remove it, or put a beginning-of-sequence token before it."
            )
        limits = np.full(len(lengths), settings.max_completion_length, dtype=np.int64)
        if context is not None:
            if (lengths >= context).any():
                worst = int(np.argmax(lengths))
                raise DataError(
                    f"a prompt must be shorter than the model's context of {context} tokens, or nothing can follow "
                    f"it; prompt {worst} of this batch has {lengths[worst]}. Shorten it, or take a model with a longer "
                    "context."
                )
            limits = np.minimum(limits, context - lengths)
        self.limits: IntArray = limits[self.prompt_of]
        self._seeds = np.array([seed for group in seeds for seed in group], dtype=np.uint64)
        self._stops = StopStrings(tokenizer, settings.stop_strings)
        self._choose = TokenSampler(settings)
        rows, width = len(self._seeds), int(self.limits.max(initial=0))
        self._ids = np.zeros((rows, width), dtype=np.int32)
        self._logprobs = np.zeros((rows, width), dtype=np.float32)
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._finish = np.full(rows, _ALIVE, dtype=np.int8)
        self._eos = np.array(settings.eos_ids, dtype=np.int64)
        self._padded: IntArray | None = None  # prompts of one width, filled up on the left with their first token
        if self._choose.needs_history:
            most = max(map(len, self.prompts), default=0)
            self._padded = np.array([[p[0]] * (most - len(p)) + p for p in self.prompts], dtype=np.int64)

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
        return np.split(np.arange(self.rows), np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def seed(self, row: int) -> int:
        """The row's seed, as torch's global generator takes it."""
        return int(self._seeds[row] & np.uint64(2**63 - 1))

    def remaining(self, rows: IntArray) -> int:
        """How many more tokens each of these rows may have, at least."""
        return int((self.limits[rows] - self._lengths[rows]).min())

    def extend(
        self, rows: IntArray, logits: Tensor, count: int = 1, step: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, BoolArray]:
        """Chooses and records the next `count` tokens of each row; returns the last ones and which rows have ended.

        `logits` has shape (rows, vocabulary), and `step` gives those after one more token of each row. Device and host
        meet once, at the end: tokens after a row's end are computed and thrown away. `count` is at most
        `remaining(rows)`. Raises ModelError where logits are not numbers.
        """
        seen = self._seen(rows, logits.device)
        noise = uniforms_on(logits.device, self._seeds[rows][:, None], self._lengths[rows][:, None] + np.arange(count))
        chosen: list[tuple[Tensor, Tensor]] = []
        for ahead in range(count):
            if ahead and step is not None:
                logits = step(chosen[-1][0])
                seen = None if seen is None else torch.cat([seen, chosen[-1][0][:, None]], dim=1)
            chosen.append(self._pick(rows, ahead, logits, noise[:, ahead], seen))
        tokens, logprobs = (torch.stack(parts).cpu().numpy() for parts in zip(*chosen, strict=True))
        for ahead in range(count):
            alive = self._finish[rows] == _ALIVE
            self._write(rows[alive], tokens[ahead, alive], logprobs[ahead, alive])
        return chosen[-1][0], self._finish[rows] != _ALIVE

    def _pick(
        self, rows: IntArray, ahead: int, logits: Tensor, noise: Tensor, seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows' tokens and log-probabilities; `ahead` counts those that were chosen and are not recorded yet."""
        return self._choose(logits, noise, seen)

    def _seen(self, rows: IntArray, device: torch.device) -> Tensor | None:
        """Prompt and completion of each row, filled up with tokens of the same row; None where nobody reads them."""
        if self._padded is not None:
            prompts = self._padded[self.prompt_of[rows]]
            ids = self._ids[rows, : int(self._lengths[rows].max())].astype(np.int64)
            ids = np.where(np.arange(ids.shape[1]) >= self._lengths[rows][:, None], prompts[:, -1:], ids)
            return upload(np.concatenate([prompts, ids], axis=1), device)
        return None

    def record(self, row: int, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Takes over a completion that was generated elsewhere, up to where it ends by our rules."""
        count, finish = min(len(ids), int(self.limits[row])), _LENGTH
        for at, token in enumerate(ids[:count], start=1):
            if token in self.settings.eos_ids:
                count, finish = at, _EOS
            elif self.settings.stop_strings and self._stops.ends(np.array(ids[:at], dtype=np.int32)):
                count, finish = at, _STOP
            if finish != _LENGTH:
                break
        check_numbers(np.array(logprobs[:count], dtype=np.float32))
        self._ids[row, :count], self._logprobs[row, :count] = ids[:count], logprobs[:count]
        self._lengths[row], self._finish[row] = count, finish

    def is_cut(self, row: int) -> bool:
        """Whether a recorded completion ends without EOS, stop string or its limit."""
        return bool(self._finish[row] == _LENGTH and self._lengths[row] < self.limits[row])

    @property
    def unfinished(self) -> list[int]:
        """The rows that are not complete."""
        return np.flatnonzero(self._finish == _ALIVE).tolist()

    def completions(self) -> list[list[GeneratedCompletion]]:
        """The finished completions, prompt by prompt."""
        return [
            [
                GeneratedCompletion(
                    self._ids[row, : self._lengths[row]].tolist(),
                    self._logprobs[row, : self._lengths[row]].tolist(),
                    _FINISH[int(self._finish[row])],
                )
                for row in rows
            ]
            for rows in self.groups()
        ]

    def state(self) -> dict[str, Tensor]:
        """How far every completion has come: what changes while generating."""
        arrays = {"ids": self._ids, "logprobs": self._logprobs, "lengths": self._lengths, "finish": self._finish}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts every completion to where it was when `state` was taken."""
        self._ids, self._logprobs = state["ids"].numpy().copy(), state["logprobs"].numpy().copy()
        self._lengths, self._finish = state["lengths"].numpy().copy(), state["finish"].numpy().copy()

    def _write(self, rows: IntArray, tokens: NDArray[Any], logprobs: NDArray[Any]) -> None:
        """Records tokens, and which rows end here: an EOS counts before a stop string, and that before the limit."""
        check_numbers(logprobs)
        at = self._lengths[rows]
        self._ids[rows, at] = tokens
        self._logprobs[rows, at] = logprobs
        self._lengths[rows] = at + 1
        finish = np.where(self._lengths[rows] >= self.limits[rows], _LENGTH, _ALIVE).astype(np.int8)
        if self.settings.stop_strings:
            stopped = [self._stops.ends(self._ids[row, : self._lengths[row]]) for row in rows]
            finish[np.array(stopped, dtype=bool)] = _STOP
        finish[np.isin(tokens, self._eos)] = _EOS
        self._finish[rows] = finish


def check_numbers(logprobs: NDArray[Any]) -> None:
    """Raises ModelError where a log-probability is not a number."""
    if np.isnan(logprobs).any():
        raise ModelError(
            "the model's logits must be numbers; got NaN or inf while generating. Its weights are damaged, or its "
            "dtype overflows: load it with dtype float32 or bfloat16, or take another model."
        )
