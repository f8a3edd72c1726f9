"""Log-probabilities of several completions of a prompt, which is computed once.

The completions of a batch lie one after the other in a single row, without padding; the attention mask separates them.

Legend: S tokens of all rows of a forward, J rows of one prompt, T tokens of the longest of them, P prompt tokens,
C key/value heads, H = C*E query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raftune.arrays import FloatArray, IntArray
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, summed
from raftune.policies.causal_lm.model_utils import device_of
from raftune.policies.causal_lm.sampling.shared_prefix import (
    PREFILL_TOKENS,
    AttentionCache,
    attending,
    attention_configs,
    prefill,
)

LEAST_ROWS = 64  # a prompt with more completions than this, and than the batch size, is computed once for so many


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
        model, examples, batches, lambda rows: token_log_probs(reader, rows, batch_size), "prefix_log_probs", batch_size
    )


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
        # By prompt: its number and length, the places (J, T) of its rows' tokens, and which of these are no padding.
        self._groups: list[tuple[int, int, Tensor, Tensor]] = []
        start, device = 0, layers[0][0].device
        for prompt, members in groupby(zip(owners.tolist(), rows, strict=True), lambda pair: pair[0]):
            lengths = [(row.start, row.tokens - 1) for _, row in members]
            sizes = np.array([size for _, size in lengths])
            columns = np.arange(sizes.max())
            starts = start + np.cumsum(sizes) - sizes
            places = torch.from_numpy(starts[:, None] + np.minimum(columns, sizes[:, None] - 1)).to(device)
            real = torch.from_numpy(columns < sizes[:, None]).to(device)
            self._groups.append((prompt, lengths[0][0], places, real))
            start += int(sizes.sum())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(length for _, length, _, _ in self._groups)

    def attend(self, query_1HSD: Tensor, key_1CSD: Tensor, value_1CSD: Tensor, scaling: float | None) -> Tensor:
        """Every completion attends to its prompt and causally to itself: (1, S, H, D)."""
        prompt_keys, prompt_values = self._prompts[self._layer]
        query_HSD, key_CSD, value_CSD = query_1HSD[0], key_1CSD[0], value_1CSD[0]
        parts = []
        for prompt, length, places, real in self._groups:
            places, real = places.to(query_HSD.device), real.to(query_HSD.device)
            count, width = places.shape
            prefix = slice(prompt, prompt + 1), slice(None), slice(length)
            # Rows of the group, out of the packed one: (J, C, P + T, D) keys and values, (J, C, E*T, D) queries.
            key, value = (
                torch.cat([states[prefix].expand(count, -1, -1, -1), packed[:, places].transpose(0, 1)], dim=2)
                for states, packed in ((prompt_keys, key_CSD), (prompt_values, value_CSD))
            )
            query = query_HSD[:, places].transpose(0, 1).reshape(count, len(key_CSD), -1, query_HSD.shape[-1])
            seen = torch.ones(width, length + width, dtype=torch.bool, device=query.device).tril(length)
            mask = seen.repeat(query.shape[2] // width, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
            out = out.reshape(count, len(query_HSD), width, -1).transpose(1, 2)  # (J, T, H, D)
            parts.append(out[real])
        return torch.cat(parts)[None]
