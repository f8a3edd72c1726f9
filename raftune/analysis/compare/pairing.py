"""Pairs the samples of A and B by prompt and seed, and counts those without a counterpart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from raftune.analysis.compare.sides import ComparedRun
from raftune.arrays import IntArray
from raftune.errors import ConfigError, DataError
from raftune.records import Prompt
from raftune.sanitize import counted


@dataclass(frozen=True)
class SamplePairs:
    """Row a[i] of A and row b[i] of B have the same prompt, prompts[groups[i]], and seed."""

    side_a: ComparedRun
    side_b: ComparedRun
    a: IntArray
    b: IntArray
    groups: IntArray
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.a)

    @cached_property
    def answers(self) -> tuple[list[Any], list[Any]]:
        """A's and B's completions, pair by pair."""
        found = [side.samples.column("completion") for side in (self.side_a, self.side_b)]
        return found[0].take(pa.array(self.a)).to_pylist(), found[1].take(pa.array(self.b)).to_pylist()

    @property
    def of_pictures(self) -> bool:
        """Whether what is compared are images, which no judge of texts can read."""
        return any(kinds.is_binary(side.samples.schema.field("completion").type) for side in (self.side_a, self.side_b))

    @property
    def asked(self) -> list[Prompt]:
        """The prompt of each pair."""
        return [self.prompts[group] for group in self.groups]

    @cached_property
    def keys(self) -> list[tuple[str, int, int | None]]:
        """Prompt id, number and seed of each pair."""
        keys = list(self.side_a.keys)
        return [keys[row] for row in self.a]


def pair(side_a: ComparedRun, side_b: ComparedRun) -> SamplePairs:
    """The pairs in A's order. Raises ConfigError where A and B are one, DataError where they have nothing in common."""
    if (side_a.run.root.resolve(), side_a.round) == (side_b.run.root.resolve(), side_b.round):
        best = " (the start is its best round)" if side_a.round == 0 else ""
        raise ConfigError(
            f"A and B must differ; both are {side_a.words}{best}. Name two rounds, such as {side_a.run.root}@1 and "
            f"{side_a.run.root}@start, or two runs."
        )
    shared = [key for key in side_a.keys if key in side_b.keys]
    if not shared:
        raise DataError(nothing_shared(side_a, side_b))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(key[0] for key in shared))}
    return SamplePairs(
        side_a,
        side_b,
        np.array([side_a.keys[key] for key in shared], dtype=np.int64),
        np.array([side_b.keys[key] for key in shared], dtype=np.int64),
        np.array([numbers[key[0]] for key in shared], dtype=np.int64),
        [side_a.prompts[name] for name in numbers],
    )


def nothing_shared(a: ComparedRun, b: ComparedRun) -> str:
    """Why no answer of A can be paired with one of B, and what to do."""
    common = len(a.prompts.keys() & b.prompts.keys())
    if not common:
        return (
            f"A and B have no prompt in common: {len(a.prompts)} in A, {len(b.prompts)} in B. Evaluate both on the "
            "same prompts: raftune evaluate … --evaluation.prompts FILE."
        )
    seeds = [side.plan["seed"][-1] for side in (a, b)]
    return (
        f"A and B share {counted(common, 'prompt')}, and no seed: evaluation.seed is {seeds[0]} in A and {seeds[1]} in "
        f"B. Evaluate one of them again: raftune evaluate … --evaluation.seed {seeds[1]}."
    )


def differences(pairs: SamplePairs) -> list[str]:
    """How A and B differ in prompts, number of answers, options of sampling and columns, a line each, with counts."""
    return [*prompts_differ(pairs), *answers_differ(pairs), *dials_differ(pairs), *columns_differ(pairs)]


def prompts_differ(pairs: SamplePairs) -> Iterator[str]:
    a, b = pairs.side_a.prompts, pairs.side_b.prompts
    if a.keys() != b.keys():
        only = [len(a.keys() - b.keys()), len(b.keys() - a.keys())]
        yield f"prompts: {len(pairs.prompts)} in common are compared; {only[0]} are in A alone, {only[1]} in B alone"


def answers_differ(pairs: SamplePairs) -> Iterator[str]:
    counts = [int(side.plan["num_generations"]) for side in (pairs.side_a, pairs.side_b)]
    if counts[0] != counts[1]:
        least = min(counts)
        yield f"answers: {counts[0]} a prompt in A, {counts[1]} in B; the first {least} of each are compared"


def dials_differ(pairs: SamplePairs) -> Iterator[str]:
    a, b = pairs.side_a.drawn_by, pairs.side_b.drawn_by
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield f"{name}: {shown(a.get(name))} in A, {shown(b.get(name))} in B"


def columns_differ(pairs: SamplePairs) -> Iterator[str]:
    theirs = pairs.side_b.prompts
    other = sum(prompt.columns != theirs[prompt.id].columns for prompt in pairs.prompts)
    if other:
        yield f"columns: of {other} prompts other than the prompt's text differ; A's go to the rewards that score now"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"
