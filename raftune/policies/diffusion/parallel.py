"""Runs several batches at once, each with a share of torch's threads.

Two batches of a small denoiser are faster in parallel on one core each than in sequence on two (docs/decisions/0025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Given = TypeVar("Given")
Found = TypeVar("Found")


class ParallelMap(Protocol):
    """What `map` does, with one iterable."""

    def __call__(self, call: Callable[[Given], Found], given: Iterable[Given], /) -> Iterator[Found]: ...


@contextmanager
def lanes(count: int) -> Iterator[ParallelMap]:
    """A `map` that makes `count` calls at once; what they give comes in order. The first failure ends all of them."""
    if count == 1:
        yield map
        return
    threads = torch.get_num_threads()
    try:
        share = max(1, threads // count)
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # a thread that begins later takes the number that was set last, by whomever
