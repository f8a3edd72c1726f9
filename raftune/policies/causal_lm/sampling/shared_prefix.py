"""Generation and scoring with a shared prefix: a prompt is computed once for K completions.

The linear layers run once over the rows of all caches; only attention is computed per cache (kv_cache.py). Attention is
replaced through transformers' AttentionInterface, and restored afterwards. Completions to be scored lie one after the
other in a single row, without padding; the attention mask separates them.

Legend: S tokens of all rows of a forward, J rows of one prompt, T tokens of the longest of them, P prompt tokens,
C key/value heads, H = C*E query heads, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from raftune.arrays import BoolArray, FloatArray, IntArray
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, summed
from raftune.policies.causal_lm.loading import device_of, evaluating
from raftune.policies.causal_lm.sampling.completions import CompletionBatch
from raftune.policies.causal_lm.sampling.fused_forward import FusedForward
from raftune.policies.causal_lm.sampling.kv_cache import KVCache
from raftune.store import partial
from raftune.training.checkpoints import holds_no_code
from raftune.training.devices import upload

ATTENTION = "raftune_shared_prefix"
PREFILL_TOKENS = 8192  # prompt tokens computed at once, padding included
LEAST_ROWS = 64  # a prompt with more completions than this, and than the batch size, is computed once for so many
SYNC_EVERY = 8  # tokens of each row between two looks at them, where a device runs ahead of the host
REFILL_SHARE = 2  # new prompts are admitted once 1/2 of the rows are free: smaller caches lose to overhead


class UnsupportedAttentionError(Exception):
    """The model's attention does something that ours does not; the message says what."""


class AttentionCache(Cache):  # type: ignore[misc]
    """Attention over keys and values of its own, with the interface that models expect of a cache."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._layer = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Notes the layer whose attention comes next, which gets the keys and values as they are."""
        self._layer = layer_idx
        return key_states, value_states


_active: ContextVar[Any] = ContextVar("_active")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function for AttentionInterface; raises UnsupportedAttentionError for what ours does not do."""
    options = [name for name in ("softcap", "s_aux", "sinks", "position_bias") if kwargs.get(name) is not None]
    if options:
        raise UnsupportedAttentionError(f"its attention uses {', '.join(options)}")
    return _active.get().attend(query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attention)


def attention_configs(model: nn.Module) -> list[Any]:
    """Every configuration that some module reads its attention's name from, once each."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}.values())


@contextmanager
def attending(cache: AttentionCache, configs: Sequence[Any]) -> Iterator[None]:
    """Within, modules of these configurations attend to the cache; afterwards as before."""
    before = [config._attn_implementation_internal for config in configs]
    token = _active.set(cache)
    try:
        for config in configs:
            config._attn_implementation_internal = ATTENTION
        yield
    finally:
        for config, earlier in zip(configs, before, strict=True):
            config._attn_implementation_internal = earlier
        _active.reset(token)


class SharedPrefixCache(AttentionCache):
    """The KV caches of all rows alive; one token is written for each row at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[KVCache] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        for part, rows in self.slices():
            part.write(layer_idx, key_states[rows], value_states[rows])
        return super().update(key_states, value_states, layer_idx)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max((int(part.positions.max()) for part in self.parts), default=0)

    def attend(self, query_RH1D: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention for all rows at the layer that was written last: (R, 1, H, D)."""
        scaling = query_RH1D.shape[-1] ** -0.5 if scaling is None else scaling
        outputs = [part.attend(self._layer, query_RH1D[rows], scaling) for part, rows in self.slices()]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def attend_new(self, layer: int, query_RHD: Tensor, key_RCD: Tensor, value_RCD: Tensor, scaling: float) -> Tensor:
        """`update` and `attend` at once, for a forward that calls neither: (R, H*D)."""
        self.update(key_RCD[:, :, None], value_RCD[:, :, None], layer)
        return self.attend(query_RHD[:, :, None], key_RCD, value_RCD, scaling).flatten(1)

    def slices(self) -> Iterator[tuple[KVCache, slice]]:
        """Each part with its rows."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.rows)
            start += part.rows


class SharedPrefixDecoder:
    """A model in evaluation mode, and its rows alive.

    The caller keeps the order of rows: `admit` appends, `keep` reorders, `step` takes one token for each.
    """

    def __init__(self, model: Any, fused: bool) -> None:
        self._model = model
        self._fused = FusedForward(model) if fused else None
        self.cache = SharedPrefixCache()
        self._configs = attention_configs(model)
        self._device = device_of(model)
        self._positions: Tensor | None = None  # of the next step, until rows change

    def restore(self, caches: Iterable[KVCache]) -> None:
        """Puts the rows of these caches in place of those alive."""
        self.cache.parts, self._positions = list(caches), None
        if self._fused is not None:
            self._fused.reserve(max((part.end for part in self.cache.parts), default=0))

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], most: int) -> Tensor:
        """Computes the prompts, gives each its count of rows, and returns their first logits (rows, vocabulary).

        No row will get more than `most` tokens.
        """
        size = max(1, PREFILL_TOKENS // max(map(len, prompts)))
        parts = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        if self._fused is not None:
            self._fused.reserve(max(map(len, prompts)) + most)
        chunks = [self._fused.prefill(part) if self._fused else prefill(self._model, part) for part in parts]
        logits = torch.cat([logits for logits, _ in chunks])
        layers = []
        for layer in zip(*(cache for _, cache in chunks), strict=True):  # keys and values, padded to one width
            width = max(keys.shape[2] for keys, _ in layer)
            padded = [[F.pad(s, (0, 0, 0, width - s.shape[2])) for s in part] for part in layer]
            layers.append((torch.cat([keys for keys, _ in padded]), torch.cat([values for _, values in padded])))
        lengths = np.array([len(prompt) for prompt in prompts])
        groups = np.repeat(np.arange(len(prompts)), counts)
        self.cache.parts.append(KVCache(layers, lengths, groups, most))
        self._positions = None
        return logits.index_select(0, torch.from_numpy(groups).to(logits.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of all rows."""
        return sum(part.nbytes for part in self.cache.parts)

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds every row its token and returns the logits of the next, of shape (rows, vocabulary)."""
        if self._positions is None:
            self._positions = upload(np.concatenate([part.positions for part in self.cache.parts]), self._device)
        positions, tokens = self._positions, tokens.to(self._device)
        if self._fused is not None:
            logits = self._fused.step(tokens, positions, self.cache.attend_new)
        else:
            with attending(self.cache, self._configs):
                logits = self._model(
                    input_ids=tokens[:, None],
                    position_ids=positions[:, None],
                    past_key_values=self.cache,
                    use_cache=True,
                    return_dict=True,
                ).logits[:, -1]
        for part in self.cache.parts:
            part.advance()
        self._positions = positions + 1
        return logits

    def keep(self, alive: BoolArray) -> IntArray:
        """Drops rows, and returns which old row each remaining one was."""
        if alive.all():
            return np.arange(len(alive))
        orders, kept = [np.zeros(0, dtype=np.int64)], []
        for part, rows in list(self.cache.slices()):
            if alive[rows].any():
                order = np.arange(part.rows) if alive[rows].all() else part.keep(alive[rows])
                orders.append(order + rows.start)
                kept.append(part)
        self.cache.parts, self._positions = kept, None
        return np.concatenate(orders)


def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Logits after each prompt (G, V), and the keys and values of every layer (G, C, P, D), right-padded.

    Padding comes last, so the causal mask alone keeps it out of every prompt.
    """
    width, device = max(map(len, prompts)), device_of(model)
    ids = torch.tensor([list(prompt) + [prompt[-1]] * (width - len(prompt)) for prompt in prompts], device=device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)

    def at_last(states: Tensor) -> Tensor:  # (G, P, X) becomes (G, 1, X)
        return states[torch.arange(len(last), device=states.device), last.to(states.device)][:, None]

    # The output layer sees one position of each row: logits of whole prompts would fill memory.
    cache, head, hook = DynamicCache(), model.get_output_embeddings(), nullcontext()
    if head is not None:
        hook = head.register_forward_pre_hook(lambda _, inputs: (at_last(inputs[0]), *inputs[1:]))
    with hook:
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(width, device=device).expand_as(ids),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits
    if logits.shape[1] > 1:
        logits = at_last(logits)
    return logits[:, 0], [(layer.keys, layer.values) for layer in cache.layers]


def generate_shared_prefix(
    model: nn.Module, batch: CompletionBatch, fused: bool = False, sync_every: int | None = None
) -> None:
    """Fills `batch` with a completion for every row. `fused`: by the forward of fused_forward.py.

    Tokens are looked at, rows dropped and prompts admitted every `sync_every` tokens; without it at every token on a
    CPU, and every SYNC_EVERY on other devices, where waiting costs more than a few tokens after a row's end. The
    longest prompts come first: neighbours of like length need little padding, and a lack of memory shows at once.
    """
    size, groups = batch.settings.batch_size, batch.groups()
    longest_first = sorted(range(len(groups)), key=lambda prompt: -len(batch.prompts[prompt]))
    queue = deque((i, groups[i][at : at + size]) for i in longest_first for at in range(0, len(groups[i]), size))
    rows, tokens = np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64)
    decoder = SharedPrefixDecoder(model, fused)
    sync_every = sync_every or (1 if device_of(model).type == "cpu" else SYNC_EVERY)
    kind = "fused" if fused else "forked"
    with torch.inference_mode(), evaluating(model), partial.current(kind).work(lambda: decoder.nbytes) as part:
        if (path := part.find()) is not None and holds_no_code(path):
            state = torch.load(path, weights_only=True)
            batch.restore(state["answers"])
            decoder.restore(KVCache.restored(cache) for cache in state["cohorts"])
            rows, tokens = state["rows"].numpy(), state["tokens"]
            queue = deque([*queue][len(queue) - state["queued"] :])

        def save(path: Path) -> None:
            caches = [cache.state() for cache in decoder.cache.parts]
            state = {"rows": torch.from_numpy(rows), "tokens": tokens, "queued": len(queue)}
            torch.save({**state, "answers": batch.state(), "cohorts": caches}, path)

        while queue or len(rows):
            part.step(save, lambda: decoder.nbytes, done=(batch.ended, batch.rows, "answers"))
            if new := _admitted(queue, size - len(rows), size):
                new_rows = np.concatenate([group for _, group in new])
                prompts, counts = [batch.prompts[prompt] for prompt, _ in new], [len(group) for _, group in new]
                logits = decoder.admit(prompts, counts, int(batch.limits[new_rows].max()))
                first, ended = batch.extend(new_rows, logits)
                alive = np.concatenate([np.ones(len(rows), dtype=bool), ~ended])
                rows, tokens = np.concatenate([rows, new_rows]), torch.cat([tokens.to(first.device), first])
            else:
                count = min(sync_every, batch.remaining(rows))
                tokens, ended = batch.extend(rows, decoder.step(tokens), count, decoder.step)
                alive = ~ended
            order = decoder.keep(alive)
            rows, tokens = rows[order], tokens[upload(order, tokens.device)]


def _admitted(queue: deque[tuple[int, IntArray]], room: int, size: int) -> list[tuple[int, IntArray]]:
    """Takes from the queue the groups that fit, once they are worth a cache of their own."""
    admitted = groups = 0
    for _, rows in queue:
        if admitted + len(rows) > room:
            break
        admitted, groups = admitted + len(rows), groups + 1
    worth = room == size or groups == len(queue) or admitted * REFILL_SHARE >= size
    return [queue.popleft() for _ in range(groups)] if worth else []


def prefix_log_probs(model: Any, examples: Sequence[TokenizedCompletion], batch_size: int) -> FloatArray:
    """(N,) nats, as `likelihood.log_probs` gives them, with every prompt computed once. Raises OutOfMemory.

    At most `batch_size` completions share a forward. Whole prompts are scored together, the longest first.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        by_prompt.setdefault(example.ids[: example.start].tobytes(), []).append(index)
    most = max(batch_size, LEAST_ROWS)
    groups = [rows[at : at + most] for rows in by_prompt.values() for at in range(0, len(rows), most)]
    groups.sort(key=lambda rows: -examples[rows[0]].start)
    batches: list[list[int]] = []
    room = tokens = width = 0
    for rows in groups:
        prompt = examples[rows[0]].start
        if not batches or len(rows) > room or prompt > tokens:
            batches.append([])
            room, tokens = batch_size, max(PREFILL_TOKENS, prompt)
            width = prompt  # the longest prompt of the batch comes first: others are padded to it
        batches[-1] += rows
        room, tokens = room - len(rows), tokens - width
    reader = CompletionLogits(model)
    return summed(
        model,
        examples,
        batches,
        lambda rows: prefix_scores(reader, rows, batch_size),
        "prefix_log_probs",
        batch_size,
    )


@torch.no_grad()
def prefix_scores(reader: CompletionLogits, rows: Sequence[TokenizedCompletion], batch_size: int) -> FloatArray:
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
        cache = PrefixCache(layers, [rows[i] for i in part], owners[part])
        completions = [rows[i].ids[rows[i].start :] for i in part]
        ids = np.concatenate([completion[:-1] for completion in completions])
        targets = np.concatenate([completion[1:] for completion in completions]).astype(np.int64)
        positions = np.concatenate([np.arange(rows[i].start, len(rows[i].ids) - 1) for i in part])
        with attending(cache, configs):
            states = reader.states(
                input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(device),
                position_ids=torch.from_numpy(positions)[None].to(device),
                past_key_values=cache,
                use_cache=True,
            )[0]
        nats = reader.log_probs(states, torch.from_numpy(targets).to(device))
        scores[np.concatenate([np.arange(ends[i] - counts[i] + 1, ends[i]) for i in part])] = nats
    return scores


class PrefixCache(AttentionCache):
    """The prompts' keys and values (G, C, P, D) of each layer, for completions packed into one row.

    The last token of each completion is left out; completions of one prompt (`owners`) are adjacent.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], rows: Sequence[TokenizedCompletion], owners: IntArray
    ) -> None:
        super().__init__()
        self._prompts = layers
        # By prompt: its number and length, the cells (J, T) of its rows' tokens, and which of these are no padding.
        self._groups: list[tuple[int, int, Tensor, Tensor]] = []
        start, device = 0, layers[0][0].device
        for prompt, members in groupby(zip(owners.tolist(), rows, strict=True), lambda pair: pair[0]):
            lengths = [(row.start, row.tokens - 1) for _, row in members]
            sizes = np.array([size for _, size in lengths])
            columns = np.arange(sizes.max())
            starts = start + np.cumsum(sizes) - sizes
            cells = torch.from_numpy(starts[:, None] + np.minimum(columns, sizes[:, None] - 1)).to(device)
            real = torch.from_numpy(columns < sizes[:, None]).to(device)
            self._groups.append((prompt, lengths[0][0], cells, real))
            start += int(sizes.sum())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(length for _, length, _, _ in self._groups)

    def attend(self, query_1HSD: Tensor, key_1CSD: Tensor, value_1CSD: Tensor, scaling: float | None) -> Tensor:
        """Every completion attends to its prompt and causally to itself: (1, S, H, D)."""
        prompt_keys, prompt_values = self._prompts[self._layer]
        query_HSD, key_CSD, value_CSD = query_1HSD[0], key_1CSD[0], value_1CSD[0]
        parts = []
        for prompt, length, cells, real in self._groups:
            cells, real = cells.to(query_HSD.device), real.to(query_HSD.device)
            count, width = cells.shape
            prefix = slice(prompt, prompt + 1), slice(None), slice(length)
            # Rows of the group, out of the packed one: (J, C, P + T, D) keys and values, (J, C, E*T, D) queries.
            key, value = (
                torch.cat([states[prefix].expand(count, -1, -1, -1), packed[:, cells].transpose(0, 1)], dim=2)
                for states, packed in ((prompt_keys, key_CSD), (prompt_values, value_CSD))
            )
            query = query_HSD[:, cells].transpose(0, 1).reshape(count, len(key_CSD), -1, query_HSD.shape[-1])
            seen = torch.ones(width, length + width, dtype=torch.bool, device=query.device).tril(length)
            mask = seen.repeat(query.shape[2] // width, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
            out = out.reshape(count, len(query_HSD), width, -1).transpose(1, 2)  # (J, T, H, D)
            parts.append(out[real])
        return torch.cat(parts)[None]
