"""Generation with a shared-prefix KV cache: a prompt is computed once for K completions.

The linear layers run once over the rows of all caches; only attention is computed per cache (kv_cache.py). Attention is
replaced through transformers' AttentionInterface, and restored afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from raftune.arrays import BoolArray, IntArray
from raftune.policies.causal_lm.model_utils import as_it_was, device_of
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.kv_cache import KVCache
from raftune.store import partial
from raftune.training.checkpoints import holds_no_code

ATTENTION = "raftune_forked"
PREFILL_TOKENS = 8192  # prompt tokens computed at once, padding included
REFILL_SHARE = 4  # the queue is asked again once 1/4 of the rows are free: smaller cohorts lose to overhead

_NOT_OURS = ("softcap", "s_aux", "sinks", "position_bias")


class UnsupportedAttentionError(Exception):
    """The model's attention does something that ours does not; the message says what."""


class SharedPrefixCache(Cache):  # type: ignore[misc]
    """The cohorts behind the face that models expect of a cache; one token is written for each row at each step."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.cohorts: list[KVCache] = []
        self._layer = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._layer = layer_idx
        for cohort, rows in self.slices():
            cohort.write(layer_idx, key_states[rows], value_states[rows])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max((int(cohort.positions.max()) for cohort in self.cohorts), default=0)

    def attend(self, query_RH1D: Tensor, scaling: float | None) -> Tensor:
        """Attention for all rows at the layer that was written last: (R, 1, H, D)."""
        scaling = query_RH1D.shape[-1] ** -0.5 if scaling is None else scaling
        parts = [cohort.attend(self._layer, query_RH1D[rows], scaling) for cohort, rows in self.slices()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def slices(self) -> Iterator[tuple[KVCache, slice]]:
        """Each cohort with its rows."""
        start = 0
        for cohort in self.cohorts:
            yield cohort, slice(start, start + cohort.rows)
            start += cohort.rows


_reading: ContextVar[SharedPrefixCache] = ContextVar("_reading")


def refuse_unknown_attention(options: Mapping[str, Any]) -> None:
    """Raises UnsupportedAttentionError where a model asks its attention for something that ours does not do."""
    asked = [name for name in _NOT_OURS if options.get(name) is not None]
    if asked:
        raise UnsupportedAttentionError(f"its attention uses {', '.join(asked)}")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The form that AttentionInterface asks for; keys and values are read from the cache that is being generated
    with.
    """
    refuse_unknown_attention(kwargs)
    return _reading.get().attend(query, scaling), None


AttentionInterface.register(ATTENTION, _attention)


class SharedPrefixDecoder:
    """A model in evaluation mode, and its rows alive.

    The caller keeps the order of rows: `admit` appends, `keep` reorders, `step` takes one token for each.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache = SharedPrefixCache()
        self._configs = attention_configs(model)
        self._device = device_of(model)

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], most: int) -> Tensor:
        """Computes the prompts, forks each into its count of rows, and returns their first logits (rows, vocabulary).

        No row will get more than `most` tokens.
        """
        size = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        chunks = [prefill(self._model, prompts[at : at + size]) for at in range(0, len(prompts), size)]
        logits = torch.cat([logits for logits, _ in chunks])
        layers = [_joined(parts) for parts in zip(*(cache for _, cache in chunks), strict=True)]
        lengths = np.array([len(prompt) for prompt in prompts])
        groups = np.repeat(np.arange(len(prompts)), counts)
        self._cache.cohorts.append(KVCache(layers, lengths, groups, most))
        return logits.index_select(0, torch.from_numpy(groups).to(logits.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        return sum(cohort.nbytes for cohort in self._cache.cohorts)

    def state(self) -> list[dict[str, Any]]:
        """What the next tokens depend on, besides the model."""
        return [cohort.state() for cohort in self._cache.cohorts]

    def restore(self, state: Sequence[dict[str, Any]]) -> None:
        self._cache.cohorts = [KVCache.restored(cohort) for cohort in state]

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds every row its token and returns the logits of the next, of shape (rows, vocabulary)."""
        positions = np.concatenate([cohort.positions for cohort in self._cache.cohorts])
        with self._attending():
            logits: Tensor = self._model(
                input_ids=tokens[:, None].to(self._device),
                position_ids=torch.from_numpy(positions)[:, None].to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            ).logits
        for cohort in self._cache.cohorts:
            cohort.advance()
        return logits[:, -1]

    def keep(self, alive: BoolArray) -> IntArray:
        """Drops rows, and returns which old row each remaining one was."""
        if alive.all():
            return np.arange(len(alive))
        orders, kept = [], []
        for cohort, rows in list(self._cache.slices()):
            if not alive[rows].any():
                continue
            order = np.arange(cohort.rows) if alive[rows].all() else cohort.keep(alive[rows])
            orders.append(order + rows.start)
            kept.append(cohort)
        self._cache.cohorts = kept
        return np.concatenate(orders) if orders else np.zeros(0, dtype=np.int64)

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """The model's attention is ours; afterwards it is what it was."""
        token = _reading.set(self._cache)
        try:
            with attention_is(ATTENTION, self._configs):
                yield
        finally:
            _reading.reset(token)


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits after each prompt (G, V), and the keys and values of every layer (G, C, P, D), right-padded.

    Padding comes last, so the causal mask alone keeps it out of every prompt.
    """
    width, device = max(map(len, prompts)), device_of(model)
    padded = [list(prompt) + [prompt[-1]] * (width - len(prompt)) for prompt in prompts]
    ids = torch.tensor(padded, device=device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    cache = DynamicCache()
    with _heading_only(model.get_output_embeddings(), last):
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(width, device=device).expand_as(ids),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
    if logits.shape[1] > 1:
        logits = _at(logits, last)
    return logits[:, 0], [(layer.keys, layer.values) for layer in cache.layers]


@contextmanager
def attention_is(name: str, configs: Sequence[Any]) -> Iterator[None]:
    """Within, modules of these configurations use this attention; afterwards the one that they had."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, earlier in zip(configs, before, strict=True):
            config._attn_implementation_internal = earlier


def attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration that some module reads its attention's name from, once each."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values())


def draw_forked(model: nn.Module, answers: CompletionBatch) -> None:
    """Fills `answers` with a completion for every row."""
    queue = _queue(answers)
    size = answers.settings.batch_size
    rows, tokens = np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64)
    with torch.inference_mode(), as_it_was(model), partial.current("forked").work(lambda: forks.nbytes) as part:
        forks = SharedPrefixDecoder(model)
        if (found := part.find()) is not None and holds_no_code(found):
            state = torch.load(found, weights_only=True)
            answers.restore(state["answers"])
            forks.restore(state["cohorts"])
            rows, tokens = state["rows"].numpy(), state["tokens"]
            queue = deque([*queue][len(queue) - state["queued"] :])

        def save(path: Path) -> None:
            own = {"rows": torch.from_numpy(rows), "tokens": tokens, "queued": len(queue)}
            torch.save({**own, "answers": answers.state(), "cohorts": forks.state()}, path)

        while queue or len(rows):
            part.step(save, lambda: forks.nbytes, done=(answers.ended, answers.rows, "answers"))
            new = _admitted(queue, size - len(rows), size)
            if new:
                first, ended = _admit(forks, answers, new)
                alive = np.concatenate([np.ones(len(rows), dtype=bool), ~ended])
                rows = np.concatenate([rows, *(group for _, group in new)])
                tokens = torch.cat([tokens.to(first.device), first])
            else:
                tokens, ended = answers.extend(rows, forks.step(tokens))
                alive = ~ended
            order = forks.keep(alive)
            rows, tokens = rows[order], tokens[torch.from_numpy(order).to(tokens.device)]


def _admit(
    forks: SharedPrefixDecoder, answers: CompletionBatch, new: list[tuple[int, IntArray]]
) -> tuple[Tensor, BoolArray]:
    """Admits groups and chooses the first token of each of their rows."""
    rows = np.concatenate([group for _, group in new])
    prompts = [answers.prompts[prompt] for prompt, _ in new]
    logits = forks.admit(prompts, [len(group) for _, group in new], int(answers.limits[rows].max()))
    return answers.extend(rows, logits)


def _queue(answers: CompletionBatch) -> deque[tuple[int, IntArray]]:
    """Groups of (prompt, rows), the longest prompts first; a group larger than the batch is split.

    Neighbours of like length need little padding, and what memory cannot hold shows at once.
    """
    groups = answers.groups()
    longest_first = sorted(range(len(groups)), key=lambda prompt: -len(answers.prompts[prompt]))
    size = answers.settings.batch_size
    return deque((i, groups[i][at : at + size]) for i in longest_first for at in range(0, len(groups[i]), size))


def _admitted(queue: deque[tuple[int, IntArray]], room: int, size: int) -> list[tuple[int, IntArray]]:
    """Takes from the queue the groups that fit, once they are worth a cohort of their own."""
    taken = 0
    groups = 0
    for _, rows in queue:
        if taken + len(rows) > room:
            break
        taken += len(rows)
        groups += 1
    worth = room == size or groups == len(queue) or taken * REFILL_SHARE >= size
    return [queue.popleft() for _ in range(groups)] if worth else []


@contextmanager
def _heading_only(head: nn.Module | None, last: Tensor) -> Iterator[None]:
    """The output layer sees one position of each row: logits of whole prompts would fill memory."""
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (_at(inputs[0], last), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def _at(states: Tensor, last: Tensor) -> Tensor:
    """Position last[g] of each row: (G, P, X) becomes (G, 1, X)."""
    last = last.to(states.device)
    return states[torch.arange(len(last), device=states.device), last][:, None]


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values of several chunks of prompts, padded to one width."""
    width = max(keys.shape[2] for keys, _ in parts)
    keys, values = (torch.cat([_widened(part[i], width) for part in parts]) for i in range(2))
    return keys, values


def _widened(states: Tensor, width: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, 0, width - states.shape[2]))
