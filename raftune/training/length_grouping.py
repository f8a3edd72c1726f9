"""Orders training rows by similar length, as a function of seed and epoch only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from raftune.arrays import IntArray
from raftune.records import derive_seed

# Steps among whose rows lengths are sorted: enough to save the padding, few enough to keep the steps' rows random.
POOL = 50


def grouped_order(lengths: Sequence[int], step: int, seed: int, epoch: int) -> IntArray:
    """A permutation of the rows in which every `step` successive ones have similar lengths.

    Rows are shuffled, sorted by length within pools of POOL steps, and cut into steps, which are shuffled again: a
    step's length is independent of its position. Rows that do not fill a step come last, as Trainer expects.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    order, size = random.permutation(len(lengths)), np.asarray(lengths)
    whole = len(order) // step * step

    def longest_first(rows: IntArray) -> IntArray:
        return rows[np.argsort(-size[rows], kind="stable")]

    pools = [longest_first(order[i : min(i + POOL * step, whole)]) for i in range(0, whole, POOL * step)]
    steps = np.concatenate(pools).reshape(-1, step) if pools else np.empty((0, step), dtype=np.int64)
    return np.concatenate([random.permutation(steps).reshape(-1), longest_first(order[whole:])]).astype(np.int64)


class LengthGroupedSampler(Sampler[int]):
    """Sampler of `grouped_order` for the epoch that was last set."""

    def __init__(self, lengths: Sequence[int], step: int, seed: int) -> None:
        self.lengths, self.step, self.seed = lengths, step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_order(self.lengths, self.step, self.seed, self.epoch).tolist())
