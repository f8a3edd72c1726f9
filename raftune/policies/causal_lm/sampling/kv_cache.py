"""KV cache of rows that were admitted together, and single-token attention over it.

Rows of one cache are always at the same step, so a write is one slice, and the rows of one prompt (a group) read one
copy of the prompt's keys. Shapes: N rows, G groups, J rows of a group at most, C key/value heads, H = C*E query heads,
P prompt columns, T columns of the rows' own tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raftune.arrays import BoolArray, IntArray
from raftune.training.devices import upload

_FIRST_WIDTH = 16  # columns allocated at first; doubled when full, so short rows never pay for long ones


class KVCache:
    """Rows 0..n-1 are alive, at step `step`: they have that many columns of their own.

    `prompts` holds keys and values (G, C, P, D) for each layer, right-padded; `lengths` the prompts' lengths; `groups`
    the group of each row. No row will have more than `most` tokens of its own.
    """

    def __init__(self, prompts: list[tuple[Tensor, Tensor]], lengths: IntArray, groups: IntArray, most: int) -> None:
        self.rows = len(groups)
        self.step = 0
        self._most = most
        self._width = min(_FIRST_WIDTH, most)
        self._lengths = lengths
        self._groups = groups
        # Of each layer: keys (G, C, D, P) and values (G, C, P, D) of the prompts, keys and values (N, C, width, D).
        self._layers: list[list[Tensor]] = []
        for keys, values in prompts:
            padding = upload(np.arange(keys.shape[2]) >= lengths[:, None], keys.device)
            # A weight of zero times an overflown value would be NaN: padding holds zeros.
            values = values.masked_fill(padding[:, None, :, None], 0)
            keys_DP = keys.transpose(2, 3).contiguous()  # a product over D is several times as fast in this order
            self._layers.append([keys_DP, values, self._empty(keys), self._empty(keys)])
        self._place_rows()

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(self.rows, like.shape[1], self._width, like.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.untyped_storage().nbytes() for layer in self._layers for tensor in layer)

    def state(self) -> dict[str, Any]:
        """What the rows' further tokens depend on. The tensors are not copied, and keep their strides."""
        return {
            "rows": self.rows,
            "step": self.step,
            "most": self._most,
            "width": self._width,
            "lengths": torch.from_numpy(self._lengths),
            "groups": torch.from_numpy(self._groups),
            "layers": [[*layer] for layer in self._layers],
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> KVCache:
        """The cache whose `state` this was."""
        cache = cls.__new__(cls)
        cache.rows, cache.step = state["rows"], state["step"]
        cache._most, cache._width = state["most"], state["width"]
        cache._lengths, cache._groups = state["lengths"].numpy(), state["groups"].numpy()
        cache._layers = [[*layer] for layer in state["layers"]]
        cache._place_rows()
        return cache

    @property
    def end(self) -> int:
        """The first position that no row reaches."""
        return int(self._lengths.max()) + self._most

    @property
    def positions(self) -> IntArray:
        """The position of each row's next token."""
        return self._lengths[self._groups] + self.step

    def write(self, layer: int, keys_NC1D: Tensor, values_NC1D: Tensor) -> None:
        """Stores the keys and values of the token that every row now reads."""
        _, _, keys, values = self._layers[layer]
        keys[: self.rows, :, self.step] = keys_NC1D[:, :, 0]
        values[: self.rows, :, self.step] = values_NC1D[:, :, 0]

    def attend(self, layer: int, query_NH1D: Tensor, scaling: float) -> Tensor:
        """Attention of one query for each row over its prompt and its own tokens, the new one included: (N, 1, H, D).

        Two matmuls for the prompt (all queries of a group against one copy) and two for the rows' own columns, joined
        before one softmax in float32. This form was chosen by measuring on CPUs; how a device computes attention is
        decided in this function alone.
        """
        prompt_keys, prompt_values, keys, values = self._layers[layer]
        rows, width = self.rows, self.step + 1
        heads, columns = keys.shape[1], prompt_values.shape[2]
        repeat = query_NH1D.shape[1] // heads
        query = (query_NH1D * scaling).reshape(rows * heads, repeat, -1)

        grid = self._scatter(query, heads)
        prompt_scores = torch.bmm(grid, prompt_keys.flatten(0, 1)).add_(self._padding_bias(heads, query))
        prompt_scores = self._gather(prompt_scores, heads, repeat)
        own_scores = torch.bmm(query, keys[:rows, :, :width].flatten(0, 1).transpose(1, 2))
        weights = torch.cat([prompt_scores, own_scores], dim=-1).softmax(-1, dtype=torch.float32).to(query.dtype)

        grid = self._scatter(weights[..., :columns], heads)
        out = self._gather(torch.bmm(grid, prompt_values.flatten(0, 1)), heads, repeat)
        out = torch.baddbmm(out, weights[..., columns:], values[:rows, :, :width].flatten(0, 1))
        return out.reshape(rows, 1, heads * repeat, -1)

    def advance(self) -> None:
        """Closes a step: every layer has been written."""
        self.step += 1
        if self.step == self._width < self._most:
            self._width = min(2 * self._width, self._most)
            for layer in self._layers:
                layer[:2] = [tensor.clone() for tensor in layer[:2]]
                for i in (2, 3):
                    wider = self._empty(layer[i])
                    wider[:, :, : self.step] = layer[i][: self.rows, :, : self.step]
                    layer[i] = wider

    def keep(self, alive: BoolArray) -> IntArray:
        """Drops the rows that are not alive, and returns which old row each remaining one was.

        Holes are filled with the last rows, so only as many rows move as have ended; prompts without rows likewise.
        """
        order = _closing_holes(alive)
        _move([buffer for layer in self._layers for buffer in layer[2:]], order, self.step)
        self.rows, self._groups = len(order), self._groups[order]
        used = np.bincount(self._groups, minlength=len(self._lengths)) > 0
        if not used.all():
            prompts = _closing_holes(used)
            _move([buffer for layer in self._layers for buffer in layer[:2]], prompts)
            for layer in self._layers:
                layer[:2] = [buffer[: len(prompts)] for buffer in layer[:2]]
            renamed = np.empty(len(used), dtype=np.int64)
            renamed[prompts] = np.arange(len(prompts))
            self._lengths, self._groups = self._lengths[prompts], renamed[self._groups]
        self._place_rows()
        return order

    def _place_rows(self) -> None:
        """Gives every row a place in the grid (G, J) of its group."""
        by_group = np.argsort(self._groups, kind="stable")
        counts = np.bincount(self._groups, minlength=len(self._lengths))
        self._rank = np.empty(self.rows, dtype=np.int64)
        self._rank[by_group] = np.arange(self.rows) - np.repeat(np.cumsum(counts) - counts, counts)
        self._deep = int(counts.max(initial=1))
        self._places: dict[tuple[int, torch.device], Tensor] = {}
        self._biases: dict[tuple[int, torch.device], Tensor] = {}

    def _places_for(self, heads: int, device: torch.device) -> Tensor:
        """Where (row, head) lies in the flattened grid (G, heads, J)."""
        if (heads, device) not in self._places:
            cells = (self._groups[:, None] * heads + np.arange(heads)) * self._deep + self._rank[:, None]
            self._places[heads, device] = upload(cells.reshape(-1), device)
        return self._places[heads, device]

    def _padding_bias(self, heads: int, like: Tensor) -> Tensor:
        """0 on the prompts' tokens and -inf on their padding, of shape (G*heads, 1, P)."""
        key = heads, like.device
        if key not in self._biases:
            padding = np.arange(self._layers[0][1].shape[2]) >= self._lengths[:, None]
            padded = upload(np.repeat(padding, heads, axis=0)[:, None], like.device)
            zeros = torch.zeros(padded.shape, dtype=like.dtype, device=like.device)
            self._biases[key] = zeros.masked_fill_(padded, -torch.inf)
        return self._biases[key]

    def _scatter(self, rows_NCEX: Tensor, heads: int) -> Tensor:
        """(N*C, E, X) laid into the grid: (G*C, J*E, X), zero where no row is."""
        _, repeat, size = rows_NCEX.shape
        grid = rows_NCEX.new_zeros(len(self._lengths) * heads * self._deep, repeat * size)
        grid.index_copy_(0, self._places_for(heads, grid.device), rows_NCEX.reshape(-1, repeat * size))
        return grid.view(-1, self._deep * repeat, size)

    def _gather(self, grid: Tensor, heads: int, repeat: int) -> Tensor:
        """The inverse of `_scatter`: (G*C, J*E, X) becomes (N*C, E, X)."""
        size = grid.shape[-1]
        cells = self._places_for(heads, grid.device)
        return grid.view(-1, repeat * size).index_select(0, cells).view(-1, repeat, size)


def _closing_holes(alive: BoolArray) -> IntArray:
    """Old indices in their new order: the survivors beyond the new end take the places of the dead before it."""
    order = np.arange(int(alive.sum()))
    holes = np.flatnonzero(~alive[: len(order)])
    order[holes] = len(order) + np.flatnonzero(alive[len(order) :])
    return order


def _move(buffers: Iterable[Tensor], order: IntArray, columns: int | None = None) -> None:
    """Rows of each buffer (rows, C, columns, D) take the places of others, which are dead: only rows that change."""
    to = np.flatnonzero(order != np.arange(len(order)))
    places: dict[torch.device, tuple[Tensor, Tensor]] = {}  # layers may lie on several devices
    for buffer in buffers if len(to) else ():
        if buffer.device not in places:
            places[buffer.device] = upload(to, buffer.device), upload(order[to], buffer.device)
        target, source = places[buffer.device]
        buffer[target, :, :columns] = buffer[source, :, :columns]
