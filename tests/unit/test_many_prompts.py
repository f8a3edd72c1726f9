"""A plan of many prompts holds few of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from raftune.errors import DataError
from raftune.planning.prompts import BATCH, lengths_of
from raftune.records import Prompt
from raftune.stages.prompts import looked_at, prompts_of_file
from raftune.store.parquet import write_table

MANY = 3 * BATCH + 1


class Counting:
    """Encodes words, and keeps the size of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, prompts: Sequence[Prompt], *, for_drawing: bool) -> list[list[int]]:
        self.calls.append(len(prompts))
        if long := [prompt for prompt in prompts if "long" in str(prompt.content)]:
            raise DataError(f"{long[0].id} is too long")
        return [[0] * len(str(prompt.content).split()) for prompt in prompts]


def written(path: Path, texts: list[str]) -> Path:
    ids = [f"{number}-0" for number in range(len(texts))]
    write_table(pa.table({"prompt_id": ids, "prompt": texts}), path, rows_per_group=MANY - 10)
    return path


def test_no_call_of_the_tokenizer_takes_more_than_a_batch(tmp_path: Path) -> None:
    encoder = Counting()
    texts = ["two words" if number % 2 else "one" for number in range(MANY)]
    assert lengths_of(written(tmp_path / "train.parquet", texts), encoder) == [len(text.split()) for text in texts]
    assert sum(encoder.calls) == MANY and max(encoder.calls) <= BATCH


def test_prompts_that_do_not_fit_are_counted_over_all_batches(tmp_path: Path) -> None:
    texts = ["long" if number in (3, MANY - 1) else "one" for number in range(MANY)]
    with pytest.raises(DataError, match=rf"2 of {MANY} prompts .*\(3-0, {MANY - 1}-0\)\. 3-0 is too long"):
        lengths_of(written(tmp_path / "train.parquet", texts), Counting())


def test_prompts_are_looked_at_one_after_another(tmp_path: Path) -> None:
    looks = looked_at(prompts_of_file(written(tmp_path / "train.parquet", ["one"] * MANY)), [])
    assert (looks.total, looks.unlike, looks.first_unlike) == (MANY, MANY, "one")
