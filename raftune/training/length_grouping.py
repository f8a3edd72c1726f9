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
    """A permutation of the rows in which every `step` successive ones are of like length.

    Rows are shuffled, sorted by length within pools of POOL steps, and cut into steps, which are shuffled again: so a
    step's length says nothing about its place. What does not fill a step comes last, as Trainer expects.
    """
    random = np.random.default_rng(derive_seed(seed, "order", epoch))
    order = random.permutation(len(lengths))
    size = np.asarray(lengths)
    whole = len(order) // step * step
    pools = [order[i : min(i + POOL * step, whole)] for i in range(0, whole, POOL * step)]
    ordered = [_longest_first(pool, size) for pool in pools]
    steps = np.concatenate(ordered).reshape(-1, step) if ordered else np.empty((0, step), dtype=np.int64)
    rest = _longest_first(order[whole:], size)
    return np.concatenate([random.permutation(steps).reshape(-1), rest]).astype(np.int64)


def _longest_first(rows: IntArray, size: IntArray) -> IntArray:
    return rows[np.argsort(-size[rows], kind="stable")]


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
