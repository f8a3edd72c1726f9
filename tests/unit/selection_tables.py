"""Tables of candidates, and one configuration of every rule and filter, for the tests of selection."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from raftune.config.selection import AnySelection
from raftune.selection import REASONS, Candidates, Verdicts, select

NAN, INF = float("nan"), float("inf")


def selection_config(**fields: Any) -> AnySelection:
    """The section `selection` with these fields."""
    return TypeAdapter(AnySelection).validate_python(fields)


# One configuration of each rule, and one of each filter.
CONFIGS: list[dict[str, Any]] = [
    {},
    {"rule": "top_m", "m": 3},
    {"rule": "top_fraction", "keep_fraction": 0.3},
    {"rule": "top_fraction", "keep_fraction": 0.25, "max_per_prompt": 2},
    {"rule": "threshold", "threshold": 2},
    {"rule": "threshold", "threshold": 1, "max_per_prompt": 2},
    {"rule": "softmax", "temperature": 0.7},
    {"rule": "random", "m": 2},
    {"all_equal": "skip"},
    {"margin": 0.75},
    {"rule": "top_m", "m": 2, "min_length": 3, "max_length": 7, "drop_duplicates": True},
]
# Rules whose decision about a prompt looks at no other prompt.
LOCAL = [fields for fields in CONFIGS if fields.get("rule") != "top_fraction"]


def prompts(
    *scores: Sequence[float], lengths: Sequence[int] | None = None, contents: Sequence[int] | None = None
) -> Candidates:
    """One group for each sequence of scores; every completion has length 1 and is distinct, unless given."""
    n = sum(len(group) for group in scores)
    return Candidates(
        group=np.repeat(np.arange(len(scores)), [len(group) for group in scores]),
        k=np.array([k for group in scores for k in range(len(group))], np.int32),
        score=np.array([score for group in scores for score in group], np.float64),
        length=np.array(lengths if lengths is not None else [1] * n, np.int64),
        content=np.array(contents if contents is not None else range(n), np.uint64),
    )


def rows(candidates: Candidates, index: np.ndarray) -> Candidates:
    return Candidates(
        candidates.group[index],
        candidates.k[index],
        candidates.score[index],
        candidates.length[index],
        candidates.content[index],
    )


def random_table(seed: int, groups: int = 60) -> Candidates:
    """Ragged groups of 1..9 with few distinct scores, some unusable, and repeated completions."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 10, groups)
    score = rng.integers(0, 5, sizes.sum()).astype(np.float64)
    score[rng.random(len(score)) < 0.15] = NAN
    score[rng.random(len(score)) < 0.05] = INF
    return Candidates(
        group=np.repeat(rng.permutation(1000)[:groups], sizes),
        k=np.concatenate([rng.permutation(20)[:size] for size in sizes]).astype(np.int32),
        score=score,
        length=rng.integers(1, 10, len(score)),
        content=rng.integers(0, 4, len(score)).astype(np.uint64),
    )


def choose(candidates: Candidates, seed: int = 0, **fields: Any) -> Verdicts:
    """The verdicts; prompts of equal scores, of which these tables have many, are kept where nothing else is said."""
    return select(candidates, selection_config(**{"all_equal": "keep", **fields}), seed)


def kept(verdicts: Verdicts) -> list[int]:
    return np.flatnonzero(verdicts.weight > 0).tolist()


def words(verdicts: Verdicts) -> list[str]:
    return [REASONS[reason] for reason in verdicts.reason]


def assert_same(a: Verdicts, b: Verdicts) -> None:
    np.testing.assert_array_equal(a.rank, b.rank)
    np.testing.assert_array_equal(a.weight, b.weight)
    np.testing.assert_array_equal(a.reason, b.reason)
