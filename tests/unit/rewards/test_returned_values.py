"""What a reward may return, and what is no list of numbers though Python would read it as one."""

from __future__ import annotations

import array
import datetime
import itertools
from collections import UserList, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, RewardSet, load_reward

try:
    import polars as pl
except ImportError:
    pl = None

NUMBERS = [0.5, 0.25, 1.0]
TAKEN: dict[str, Any] = {
    "list": lambda: list(NUMBERS),
    "tuple": lambda: tuple(NUMBERS),
    "deque": lambda: deque(NUMBERS),
    "user list": lambda: UserList(NUMBERS),
    "array.array": lambda: array.array("d", NUMBERS),
    "generator": lambda: (number for number in NUMBERS),
    "map": lambda: map(float, NUMBERS),
    "numpy": lambda: np.array(NUMBERS),
    "numpy, one column": lambda: np.array(NUMBERS).reshape(3, 1),
    "numpy objects": lambda: np.array(NUMBERS, dtype=object),
    "masked array that hides nothing": lambda: np.ma.array(NUMBERS),
    "torch": lambda: torch.tensor(NUMBERS),
    "torch, bfloat16": lambda: torch.tensor(NUMBERS, dtype=torch.bfloat16),
    "torch, one column, with gradient": lambda: torch.tensor(NUMBERS, requires_grad=True).unsqueeze(1),
    "torch scalars": lambda: [torch.tensor(number) for number in NUMBERS],
    "tensors of one element": lambda: [torch.tensor([[number]]) for number in NUMBERS],
    "numpy scalars": lambda: [np.float16(number) for number in NUMBERS],
    "decimals and fractions": lambda: [Decimal("0.5"), Fraction(1, 4), 1],
    "pandas": lambda: pd.Series(NUMBERS, index=[7, 3, 5]),
    "arrow": lambda: pa.array(NUMBERS),
    "arrow, chunked": lambda: pa.chunked_array([NUMBERS[:1], NUMBERS[1:]]),
}
REFUSED: dict[str, Any] = {
    "set": lambda: set(NUMBERS),
    "frozenset": lambda: frozenset(NUMBERS),
    "dict": lambda: dict.fromkeys(NUMBERS),
    "dict_keys": lambda: dict.fromkeys(NUMBERS).keys(),
    "dict_values": lambda: {"a": 0.5, "b": 0.25, "c": 1.0}.values(),
    "set_iterator": lambda: iter(set(NUMBERS)),
    "bytes": lambda: b"abc",
    "bytearray": lambda: bytearray(b"abc"),
    "DataFrame": lambda: pd.DataFrame({"score": NUMBERS}),
    "ndarray": lambda: np.zeros((3, 2)),
    "Tensor": lambda: torch.zeros(3, 1, 1),
    "timedelta64": lambda: np.array([1, 2, 3], "m8[ns]"),
    "datetime64": lambda: np.array([1, 2, 3], "M8[ns]"),
}
NO_NUMBERS: dict[str, Any] = {
    "MaskedConstant": np.ma.masked,
    "MaskedArray": np.ma.array(1.0, mask=True),
    "timedelta64": np.timedelta64(3, "ns"),
    "datetime64": np.datetime64(3, "ns"),
    "timedelta": datetime.timedelta(3),
    "Timedelta": pd.Timedelta(3),
    "NAType": pd.NA,
    "NaTType": pd.NaT,
    "str": "0.5",
    "list": [0.5],
    "set": {0.5},
    "complex": 1j,
    "ndarray": np.array([]),
}


def parts(returned: Any, size: int = 3) -> list[Any]:
    with RewardSet([load_reward(lambda completions: returned)]) as rewards:
        return [score.parts["lambda"] for score in rewards.score(RewardBatch(["q"] * size, ["a"] * size))]


@pytest.mark.parametrize("kind", TAKEN)
def test_numbers_in_the_order_of_the_samples_are_taken_from_every_common_kind_of_list(kind: str) -> None:
    assert [(part.value, part.status) for part in parts(TAKEN[kind]())] == [
        (number, ScoreStatus.OK) for number in NUMBERS
    ]


@pytest.mark.skipif(pl is None, reason="polars is not installed")
def test_a_series_of_polars_is_a_list_and_its_null_does_not_apply() -> None:
    found = parts(pl.Series([0.5, None, 1.0]))
    assert [(part.value, part.status) for part in found] == [
        (0.5, ScoreStatus.OK),
        (None, ScoreStatus.NOT_APPLICABLE),
        (1.0, ScoreStatus.OK),
    ]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_order_or_is_no_list_is_invalid_by_its_name(kind: str) -> None:
    found = parts(REFUSED[kind]())
    assert {part.status for part in found} == {ScoreStatus.INVALID}
    assert {part.value for part in found} == {None}
    if kind not in ("timedelta64", "datetime64"):
        assert found[0].detail.startswith(f"returned {kind} ")


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_a_value_that_is_missing_or_a_time_is_no_number(kind: str) -> None:
    found = parts([0.5, NO_NUMBERS[kind], 1.0])
    assert [part.status for part in found] == [ScoreStatus.OK, ScoreStatus.INVALID, ScoreStatus.OK]
    assert found[1].value is None
    assert found[1].detail.startswith(f"returned {kind} ")


def test_a_masked_array_hides_its_entries_and_only_those() -> None:
    found = parts(np.ma.array(NUMBERS, mask=[False, True, False]))
    assert [part.status for part in found] == [ScoreStatus.OK, ScoreStatus.INVALID, ScoreStatus.OK]


@pytest.mark.parametrize("endless", [lambda: (1.0 for _ in itertools.count()), lambda: map(float, itertools.count())])
def test_values_without_end_are_too_many_and_not_the_end_of_the_memory(endless: Callable[[], Any]) -> None:
    found = parts(endless())
    assert {part.status for part in found} == {ScoreStatus.INVALID}
    assert "more than 3 values" in found[0].detail
