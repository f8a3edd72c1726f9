"""Diversity of texts: distinct-n, MSTTR, entropy and near-duplicates.

A word is a run of letters, digits and underscores, in lower case. Counts are exact and
use 8 bytes a word; texts can come from a generator.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from raftune.arrays import FloatArray, IntArray, UInt64Array

WORD = re.compile(r"\w+")

HASHES = 256  # of a text's word pairs, in bands
MISSED = 1e-6  # the chance at most that a pair of texts right at the threshold shares no band
NEIGHBOURS = 8  # texts before it in a bucket that a text is compared with
PRIME = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """The words of T texts as numbers: ids (W,), equal for equal words; text i is ids[starts[i]:starts[i + 1]]."""

    ids: IntArray
    starts: IntArray
    vocabulary: int

    @property
    def lengths(self) -> IntArray:
        """(T,) words of each text."""
        return np.diff(self.starts)


Texts = Iterable[str] | TokenizedTexts


def numbered(texts: Texts) -> TokenizedTexts:
    """The texts' words, read once; to measure the same texts in several ways, number them once and give the result."""
    if isinstance(texts, TokenizedTexts):
        return texts
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    ids, starts = array("q"), array("q", [0])
    for text in texts:
        ids.extend(numbers[word] for word in WORD.findall(text.lower()))
        starts.append(len(ids))
    return TokenizedTexts(np.frombuffer(ids, np.int64), np.frombuffer(starts, np.int64), len(numbers))


def distinct(texts: Texts, n: int) -> float | None:
    """Distinct-n: different n-grams over all n-grams of the whole set, in (0, 1]; None where there is none.

    Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016). It falls as the set
    grows: compare sets of about one size.
    """
    grams = ngrams(numbered(texts), n)
    return len(np.unique(grams)) / len(grams) if len(grams) else None


def unique(texts: Texts, n: int) -> int | None:
    """Unique-n: how many n-grams occur exactly once in the whole set; None where there is no n-gram.

    As GEM and RL4LMs count it (van Miltenburg et al. 2018), whose tables the RAFT paper follows. A number, not a share:
    it grows with the set.
    """
    grams = ngrams(numbered(texts), n)
    return int(np.sum(np.unique(grams, return_counts=True)[1] == 1)) if len(grams) else None


def msttr(texts: Texts, window: int = 100) -> float | None:
    """MSTTR: the share of different words in a segment of `window` words, averaged, in (0, 1] (Johnson 1944).

    The texts are joined in their order and cut into segments side by side; what is left over at the end is not
    counted, as in GEM. None where all texts together have fewer words than one segment.
    """
    ids = numbered(texts).ids
    size = len(ids) // window
    if not size:
        return None
    segments = np.sort(ids[: size * window].reshape(size, window), axis=1)
    return float((1 + np.count_nonzero(np.diff(segments, axis=1), axis=1)).mean() / window)


def word_measures(texts: Texts) -> dict[str, Any]:
    """distinct_n and unique_n for n = 1 and 2, and msttr_100; None for what cannot be measured."""
    words = numbered(texts)
    measures: dict[str, Any] = {f"distinct_{n}": distinct(words, n) for n in (1, 2)}
    return measures | {f"unique_{n}": unique(words, n) for n in (1, 2)} | {"msttr_100": msttr(words)}


def similarities(texts: Texts, groups: IntArray) -> FloatArray:
    """(G,) the mean similarity of two different texts of each group, in [0, 1]; NaN for a group of one text or none.

    Text i belongs to group groups[i]. Two texts are as similar as the cosine of the counts of their word pairs, the
    text's ends counted as words: 1 for texts of the same words in the same order (two without words, too), 0 where no
    pair is shared. The mean over pairs of unit vectors u is (|Σ u|² - K)/(K² - K), so that the cost grows with the
    words and not with K².
    """
    pairs, owner = bounded_pairs(numbered(texts))
    size = int(pairs.max(initial=0)) + 1
    cells, counts = np.unique(owner * size + pairs, return_counts=True)
    owners, kinds = cells // size, cells % size
    norms = np.sqrt(np.bincount(owners, weights=counts.astype(np.float64) ** 2, minlength=len(groups)))
    shared, position = np.unique(groups[owners] * size + kinds, return_inverse=True)
    sums = np.bincount(position, weights=counts / norms[owners], minlength=len(shared))
    members = np.bincount(groups, minlength=int(groups.max(initial=-1)) + 1)
    squares = np.bincount(shared // size, weights=sums**2, minlength=len(members))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = (squares - members) / (members * (members - 1))
    return np.where(members > 1, np.clip(values, 0.0, 1.0), np.nan)


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[list[int]]:
    """Clusters of the texts' indices, the largest first: each text shares at least `threshold` with one of its cluster.

    Two texts share the word pairs that are in both over those that are in either (Jaccard), the text's ends counted as
    words: one word changed in twenty leaves 0.83. Every link is computed exactly; which pairs are compared is decided
    by MinHash (Broder 1997) in bands, so that the cost grows with the words and not with their square. A pair right at
    the threshold goes unseen with a chance below one in a million, and where unlike texts stand between them in all
    bands. Raises ValueError for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1]; got {threshold}. It is a share of word pairs: write 0.8.")
    shingles = shingle_sets(numbered(texts))
    parents = list(range(len(texts)))  # disjoint sets: trees that point to the lowest index of each cluster

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    def join(left: int, right: int) -> None:
        low, high = sorted((root(left), root(right)))
        parents[high] = low

    first_of: dict[bytes, int] = {}
    for index, shingle in enumerate(shingles):
        join(first_of.setdefault(shingle.tobytes(), index), index)
    if threshold < 1:
        sets = {index: frozenset(shingles[index].tolist()) for index in first_of.values()}
        for left, right in candidate_pairs([*first_of.values()], shingles, threshold):
            if root(left) != root(right):
                both = len(sets[left] & sets[right])
                if both >= threshold * (len(sets[left]) + len(sets[right]) - both):
                    join(left, right)
    clusters: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(texts)):
        clusters[root(index)].append(index)
    return sorted((c for c in clusters.values() if len(c) > 1), key=lambda c: (-len(c), c[0]))


def candidate_pairs(chosen: Sequence[int], shingles: Sequence[IntArray], limit: float) -> Iterator[tuple[int, int]]:
    """Pairs of the chosen texts whose least hashes are equal in a band, of neighbours only where many share one."""
    if not chosen:
        return
    flat = np.concatenate([shingles[index] for index in chosen])
    starts = np.cumsum([0, *(len(shingles[index]) for index in chosen)])[:-1]
    # The most hashes in a band with which a pair at the threshold is still seen: longer bands compare fewer pairs.
    fit = [rows for rows in range(1, 17) if (1 - limit**rows) ** (HASHES // rows) <= MISSED]
    rows = max(fit, default=1)
    generator = np.random.Generator(np.random.Philox(0))
    for _ in range(HASHES // rows):
        factors = generator.integers(1, PRIME, (rows, 2))
        least = [np.minimum.reduceat(mixed(flat, int(a), int(b)), starts) for a, b in factors]
        buckets: defaultdict[bytes, list[int]] = defaultdict(list)
        for index, row in zip(chosen, np.stack(least, axis=1), strict=True):
            buckets[row.tobytes()].append(index)
        for members in buckets.values():
            for at, index in enumerate(members):
                yield from ((other, index) for other in members[max(at - NEIGHBOURS, 0) : at])


def mixed(numbers: IntArray, a: int, b: int) -> UInt64Array:
    """A hash of each number, by multiplication and shifts (as in SplitMix64)."""
    # Shingles are numbered from 0, so that a·x + b, mixed once more, has no order that the numbering gave it.
    x = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(a << 32 | b)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), dtype=np.uint64)


def ngrams(words: TokenizedTexts, n: int) -> IntArray:
    """The n-grams of all texts as numbers, equal for equal n-grams; none crosses from one text to the next."""
    grams, ids = words.ids, words.ids
    for step in range(1, n):
        if len(ids) <= step:
            return np.empty(0, np.int64)
        grams = np.unique(grams[:-1] * words.vocabulary + ids[step:], return_inverse=True)[1].reshape(-1)
    owner = np.repeat(np.arange(len(words.lengths)), words.lengths)
    return np.asarray(grams[owner[: len(grams)] == owner[n - 1 :]], dtype=np.int64)


def bounded_pairs(words: TokenizedTexts) -> tuple[IntArray, IntArray]:
    """(W + T,) the word pairs of all texts as numbers, a text's ends counted as words, and the text of each."""
    ids = np.insert(words.ids + 1, words.starts, 0)
    pairs = np.unique(ids[:-1] * (words.vocabulary + 1) + ids[1:], return_inverse=True)[1].reshape(-1)
    return pairs, np.repeat(np.arange(len(words.lengths)), words.lengths + 1)


def shingle_sets(words: TokenizedTexts) -> list[IntArray]:
    """For each text its different word pairs, ascending."""
    pairs, _ = bounded_pairs(words)
    ends = np.cumsum(words.lengths + 1)
    return [np.unique(part) for part in np.split(pairs, ends[:-1])] if len(ends) else []
