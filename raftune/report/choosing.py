"""Chooses the samples that a report shows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

from raftune.report.page import embedded

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """The samples of one prompt in one round: how many, how far the best is above their mean, and whether any is kept.

    `number` is the prompt's place in its unit; `margin` is None where nothing could be scored.
    """

    round: int
    chunk: int
    number: int
    prompt_id: str
    samples: int
    margin: float | None
    without_candidates: bool


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """One held-out prompt and sample, in all rounds; `gain` is the best round's score less the start's, if both
    exist.
    """

    chunk: int
    prompt_id: str
    k: int
    gain: float | None


def order_groups(groups: Sequence[PromptGroup], most: int) -> list[PromptGroup]:
    """The most instructive prompts of a round first: largest margins, those that yielded nothing, and by hash, in turn.

    A prompt's id is a hash: the smallest ids are a random choice, and the same one in every round.
    """
    by_margin = sorted((g for g in groups if g.margin is not None), key=lambda g: -(g.margin or 0.0))
    without_candidates = sorted((g for g in groups if g.without_candidates), key=lambda g: g.prompt_id)
    by_hash = sorted(groups, key=lambda g: g.prompt_id)
    return first(in_turn(by_margin, without_candidates, by_hash), most, lambda g: g.prompt_id)


def order_pairs(pairs: Sequence[HeldOutPair], most: int) -> list[HeldOutPair]:
    """The most instructive held-out samples first: largest gains, largest losses, and by hash, in turn."""
    known = sorted((p for p in pairs if p.gain is not None), key=lambda p: -(p.gain or 0.0))
    by_hash = sorted(pairs, key=lambda p: (p.k, p.prompt_id))
    return first(in_turn(known, known[::-1], by_hash), most, lambda p: (p.prompt_id, p.k))


def in_turn(*lists: Iterable[Item]) -> Iterator[Item]:
    """The first of each list, then the second of each, and so on."""
    boxed = (([item] for item in one) for one in lists)
    for turn in zip_longest(*boxed, fillvalue=[]):
        yield from chain.from_iterable(turn)


def first(items: Iterable[Item], most: int, key: Callable[[Item], Key]) -> list[Item]:
    """The first `most` items of different keys."""
    seen: dict[Key, Item] = {}
    for item in items:
        if len(seen) >= most:
            break
        seen.setdefault(key(item), item)
    return list(seen.values())


def up_to(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> list[Item]:
    """The first items whose sizes sum to no more than `most`; one at least."""
    taken: list[Item] = []
    total = 0
    for item in items:
        total += size(item)
        if taken and total > most:
            break
        taken.append(item)
    return taken


def encoded_size(item: Any) -> int:
    """The bytes that the item takes in the page, with what is escaped there: six for each `<` of an answer of code."""
    return len(embedded(item).encode())
