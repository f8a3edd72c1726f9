"""Log-probabilities of several completions of a prompt, which is computed once.

The completions of a batch lie one after the other in a single row, without padding; the attention mask separates them.

Legend: S tokens of all rows of a forward, J rows of one prompt, T tokens of the longest of them, P prompt tokens,
C key/value heads, H = C*E query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from raftune.arrays import FloatArray, IntArray
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, cross_entropies, summed
from raftune.policies.causal_lm.model_utils import device_of
from raftune.policies.causal_lm.sampling.shared_prefix import (
    PREFILL_TOKENS,
    attention_configs,
    attention_is,
    prefill,
    refuse_unknown_attention,
)

ATTENTION = "raftune_prefix_scoring"
LEAST_ROWS = 64  # a prompt with more completions than this, and than the batch size, is computed once for so many


def prefix_log_probs(model: Any, examples: Sequence[TokenizedCompletion], batch_size: int) -> FloatArray:
    """(N,) nats, as `likelihood.log_probs` gives them, with every prompt computed once. Raises OutOfMemory.

    At most `batch_size` completions share a forward.
    """
    reader = CompletionLogits(model)
    batches = _batches(examples, batch_size)
    return summed(
        model, examples, batches, lambda rows: token_log_probs(reader, rows, batch_size), "prefix_log_probs", batch_size
    )


def _batches(examples: Sequence[TokenizedCompletion], batch_size: int) -> list[list[int]]:
    """Indices of the examples that are scored together: whole prompts, the longest first."""
    by_prompt: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.ids[: example.start].tobytes(), []).append(index)
    most = max(batch_size, LEAST_ROWS)
    groups = [rows[at : at + most] for rows in by_prompt.values() for at in range(0, len(rows), most)]
    groups.sort(key=lambda rows: -examples[rows[0]].start)
    batches: list[list[int]] = []
    room = tokens = 0
    for rows in groups:
        prompt = examples[rows[0]].start
        if not batches or len(rows) > room or prompt > tokens:
            batches.append([])
            room, tokens = batch_size, max(PREFILL_TOKENS, prompt)
            width = prompt  # the longest prompt of the batch comes first: others are padded to it
        batches[-1] += rows
        room, tokens = room - len(rows), tokens - width
    return batches


@torch.no_grad()
def token_log_probs(reader: CompletionLogits, rows: Sequence[TokenizedCompletion], batch_size: int) -> FloatArray:
    """(T,) nats of each completion token of the rows, in order; rows of one prompt are adjacent."""
    model, device = reader.model, device_of(reader.model)
    groups = [list(group) for _, group in groupby(rows, lambda row: row.ids[: row.start].tobytes())]
    first_logits, layers = prefill(model, [group[0].ids[: group[0].start].tolist() for group in groups])
    owners = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    counts = np.array([row.tokens for row in rows])
    ends = np.cumsum(counts)
    scores = np.empty(int(counts.sum()), dtype=np.float64)

    starting = np.flatnonzero(counts)  # the first token of a completion is predicted by the prompt's last
    tokens = torch.tensor([rows[i].ids[rows[i].start] for i in starting.tolist()], dtype=torch.int64, device=device)
    chosen = first_logits[torch.from_numpy(owners[starting]).to(device)].float()
    scores[(ends - counts)[starting]] = -F.cross_entropy(chosen, tokens, reduction="none").double().cpu().numpy()

    configs, reading = attention_configs(model), np.flatnonzero(counts > 1)
    for at in range(0, len(reading), batch_size):
        part = reading[at : at + batch_size].tolist()
        packed = Packed.of([rows[i] for i in part], owners[part])
        cache = PrefixCache(layers, packed)
        completions = [rows[i].ids[rows[i].start :] for i in part]
        ids = np.concatenate([completion[:-1] for completion in completions])
        targets = np.concatenate([completion[1:] for completion in completions]).astype(np.int64)
        positions = np.concatenate([np.arange(rows[i].start, len(rows[i].ids) - 1) for i in part])
        with attention_is(ATTENTION, configs), _reading_from(cache):
            states = reader.states(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                past_key_values=cache,
                use_cache=True,
            )[0]
        losses = cross_entropies(reader, states, torch.from_numpy(targets).to(device))
        scores[np.concatenate([np.arange(ends[i] - counts[i] + 1, ends[i]) for i in part])] = -losses
    return scores


@dataclass(frozen=True)
class Group:
    """Rows of one prompt: `places` (J, T) of their tokens in the packed row, and which of these are no padding."""

    prompt: int
    length: int
    places: IntArray
    real: np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Packed:
    """Completions, their last tokens left out, one after the other; those of one prompt are adjacent."""

    groups: list[Group]

    @classmethod
    def of(cls, rows: Sequence[TokenizedCompletion], owners: IntArray) -> Packed:
        groups, start = [], 0
        for prompt, members in groupby(zip(owners.tolist(), rows, strict=True), lambda pair: pair[0]):
            lengths = [(row.start, row.tokens - 1) for _, row in members]
            sizes = np.array([size for _, size in lengths])
            columns = np.arange(sizes.max())
            starts = start + np.cumsum(sizes) - sizes
            places = starts[:, None] + np.minimum(columns, sizes[:, None] - 1)
            groups.append(Group(prompt, lengths[0][0], places, columns < sizes[:, None]))
            start += int(sizes.sum())
        return cls(groups)


class PrefixCache(Cache):  # type: ignore[misc]
    """The prompts' keys and values (G, C, P, D) of each layer, behind the face that models expect of a cache."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], packed: Packed) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._prompts, self._packed = layers, packed
        self._layer = 0
        device = layers[0][0].device
        self._indices = [
            (torch.from_numpy(group.places).to(device), torch.from_numpy(group.real).to(device))
            for group in packed.groups
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._layer = layer_idx
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(group.length for group in self._packed.groups)

    def attend(self, query_1HSD: Tensor, key_1CSD: Tensor, value_1CSD: Tensor, scaling: float | None) -> Tensor:
        """Every completion attends to its prompt and causally to itself: (1, S, H, D)."""
        prompt_keys, prompt_values = self._prompts[self._layer]
        heads = key_1CSD.shape[1]
        parts = []
        for group, (places, real) in zip(self._packed.groups, self._indices, strict=True):
            places, real = places.to(query_1HSD.device), real.to(query_1HSD.device)
            count, width = places.shape
            own = slice(group.prompt, group.prompt + 1), slice(None), slice(group.length)
            key = torch.cat([prompt_keys[own].expand(count, -1, -1, -1), _rows(key_1CSD, places)], dim=2)
            value = torch.cat([prompt_values[own].expand(count, -1, -1, -1), _rows(value_1CSD, places)], dim=2)
            query = _rows(query_1HSD, places).reshape(count, heads, -1, query_1HSD.shape[-1])  # (J, C, E*T, D)
            seen = torch.ones(width, group.length + width, dtype=torch.bool, device=query.device).tril(group.length)
            mask = seen.repeat(query.shape[2] // width, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
            out = out.reshape(count, query_1HSD.shape[1], width, -1).transpose(1, 2)  # (J, T, H, D)
            parts.append(out[real])
        return torch.cat(parts)[None]


def _rows(states_1XSD: Tensor, places_JT: Tensor) -> Tensor:
    """The rows of a group, out of the packed one: (J, X, T, D)."""
    return states_1XSD[0][:, places_JT].transpose(0, 1)


_cache: ContextVar[PrefixCache] = ContextVar("_cache")


@contextmanager
def _reading_from(cache: PrefixCache) -> Iterator[None]:
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The form that AttentionInterface asks for; the prompts' keys and values come from the cache in use."""
    refuse_unknown_attention(kwargs)
    return _cache.get().attend(query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attention)
