"""Writes the pairs to Parquet: both completions, every score, every verdict and the judge's raw replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.analysis.compare.measures import ComparisonMeasure
from raftune.analysis.compare.pairing import SamplePairs
from raftune.clients.chat import ChatReply
from raftune.errors import ConfigError
from raftune.evaluation.judge import JudgeOpinion, failure_of
from raftune.store.files import explaining
from raftune.store.parquet import write_table

WORDS = {1.0: "win", 0.0: "tie", -1.0: "loss"}


def check_out(out: str | Path | None) -> None:
    """Raises ConfigError unless the rows can be written there."""
    if out is None:
        return
    path = Path(out)
    if path.suffix != ".parquet":
        raise ConfigError(f"--out must end in .parquet; got {path.name!r}. Rename it.")
    if path.exists():
        raise ConfigError(f"--out must not exist yet; {path} does. Choose another name.")


def write_rows(out: str | Path, pairs: SamplePairs, measures: Sequence[ComparisonMeasure]) -> None:
    """Writes one row a pair; the file appears whole or not at all."""
    path = Path(out)
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            write_table(table_of(pairs, measures), part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def table_of(pairs: SamplePairs, measures: Sequence[ComparisonMeasure]) -> pa.Table:
    """prompt_id, prompt, k, seed, a, b; for each measure NAME/a, NAME/b and NAME/verdict (win, tie, loss: A's); of a
    judge also what it said in either order."""
    ids, numbers, seeds = zip(*pairs.keys, strict=True)
    a, b = pairs.answers
    columns: dict[str, Any] = {
        "prompt_id": ids,
        "prompt": [prompt.content for prompt in pairs.asked],
        "k": pa.array(numbers, pa.int32()),
        "seed": pa.array(seeds, pa.int64()),
        "a": a,
        "b": b,
    }
    for measure in measures:
        columns |= columns_of(measure)
    return pa.table(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )


def columns_of(measure: ComparisonMeasure) -> dict[str, pa.Array]:
    """The measure's columns; none of one that could not be computed."""
    if measure.result is None:
        return {}
    scores = {name: values for name, values in (("a", measure.a), ("b", measure.b)) if values is not None}
    columns = {f"{measure.name}/{name}": pa.array(values, from_pandas=True) for name, values in scores.items()}
    columns[f"{measure.name}/verdict"] = pa.array([WORDS.get(float(o)) for o in measure.outcomes], pa.string())
    if measure.judgement is not None:
        columns |= columns_of_judge(measure.name, measure.judgement.opinions)
    return columns


def columns_of_judge(name: str, opinions: Sequence[JudgeOpinion]) -> dict[str, pa.Array]:
    """What was said with A's answer first, and with B's: the verdict (A, B, tie), the failure, and the raw reply."""
    columns: dict[str, list[Any]] = {}
    for order in ("a_first", "b_first"):
        replies: list[ChatReply | None] = [getattr(opinion, order) for opinion in opinions]
        columns[f"{name}/{order}/verdict"] = [getattr(opinion, f"verdict_{order}") for opinion in opinions]
        columns[f"{name}/{order}/reply"] = [None if reply is None else reply.text for reply in replies]
        columns[f"{name}/{order}/failure"] = [None if reply is None else failure_of(reply) for reply in replies]
    columns[f"{name}/identical"] = [opinion.identical for opinion in opinions]
    types = {"identical": pa.bool_()}
    return {key: pa.array(values, types.get(key.split("/")[-1], pa.string())) for key, values in columns.items()}
