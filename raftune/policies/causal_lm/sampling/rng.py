"""Uniform noise for each sample, a function of its seed and the step only.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3). It is
counter-based: any step of any sample can be computed alone, in any order, in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from raftune.arrays import FloatArray, UInt64Array

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox4x32(
    counter: Sequence[UInt64Array], key: Sequence[UInt64Array]
) -> tuple[UInt64Array, UInt64Array, UInt64Array, UInt64Array]:
    """Four pseudo-random 32-bit words for each (counter, key).

    `counter` is four and `key` two arrays of 32-bit words, held in uint64 and of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(_ROUNDS):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (product1 >> _HALF) ^ c1 ^ k0, product1 & _LOW, (product0 >> _HALF) ^ c3 ^ k1, product0 & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: ArrayLike, steps: ArrayLike) -> FloatArray:
    """Numbers uniform on [0, 1) with 53 random bits, one for each (seed, step).

    Seeds are integers of up to 64 bits, steps are at least 0; the shapes broadcast. The seed is the key, the step the
    counter.
    """
    seed, step = np.asarray(seeds).astype(np.uint64), np.asarray(steps).astype(np.uint64)
    zero = np.zeros_like(step)
    high, low, _, _ = philox4x32((step & _LOW, step >> _HALF, zero, zero), (seed & _LOW, seed >> _HALF))
    bits = ((high << np.uint64(21)) ^ (low >> np.uint64(11))) & np.uint64((1 << 53) - 1)
    return np.asarray(bits * 2.0**-53, dtype=np.float64)
