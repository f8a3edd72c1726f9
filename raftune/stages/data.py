"""Stage `data`: copies the prompts into the run and gives them ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.config.evaluation import FEWEST_UNITS
from raftune.config.run import RunConfig
from raftune.data.tables import read_rows
from raftune.errors import DataError, RunDamaged
from raftune.protocols import SingleStage, StageInputs
from raftune.records import TOOLS, JsonType, arrow_array, derive_seed, prompt_ids, without_none
from raftune.sanitize import counted, shell_command
from raftune.stages.log_probs import check_references
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import dump_json
from raftune.store.parquet import read_table, write_table
from raftune.store.run import RunFolder

RESERVED = ("prompt_id", "prompt", "sample_id", "completion")
_AT_ONCE = 4096  # values
Source = Callable[[], pa.Table]
ColumnCheck = Callable[[Collection[str], Collection[str]], None]


class DataStage(SingleStage):
    """Reads, checks and splits the prompts: train.parquet and held_out.parquet, each with prompt_id and prompt."""

    name = writes = "data"
    fields = ("data", "evaluation.prompts", "evaluation.split", "evaluation.num_prompts")

    def __init__(
        self,
        config: RunConfig,
        train: Source | None = None,
        held_out: Source | None = None,
        check_columns: ColumnCheck = lambda train, held_out: None,
    ) -> None:
        """`check_columns` gets the names of the columns of both, and raises for what a reward lacks."""
        self.config, self.given_train, self.given_held_out = config, train, held_out
        self.check_columns = check_columns

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        data, evaluation = self.config.data, self.config.evaluation
        num_prompts = evaluation.num_prompts
        train, held_out = self.train(), self.held_out() if num_prompts else None
        if train is not None and data.limit is not None:
            train = train.slice(0, data.limit)
        if held_out is not None:
            held_out = held_out.slice(0, num_prompts)
            train = held_out.slice(0, 0) if train is None else train
        else:
            assert train is not None  # the configuration names one or the other
            train, held_out = hold_out(train, num_prompts)
        for column in self.config.sampling.candidate_columns if self.config.num_rounds else ():
            if column not in train.column_names:
                raise DataError(
                    f"sampling.candidate_columns names {column!r}, which the prompts lack; they have "
                    f"{', '.join(train.column_names[1:])}. Name one of these, or leave it out."
                )
        if evaluation.reference_column is not None:
            check_references(held_out, evaluation.reference_column)
        self.check_columns(train.column_names, held_out.column_names)
        write_table(train, out / "train.parquet")
        write_table(held_out, out / "held_out.parquet")
        ids = train.column("prompt_id").to_pylist()
        trained = set(map(_content_of, ids))
        notes = {
            "train": train.num_rows,
            "held_out": held_out.num_rows,
            "repeated": sum(not name.endswith("-0") for name in ids),
            "overlap": sum(_content_of(name) in trained for name in held_out.column("prompt_id").to_pylist()),
        }
        dump_json(out / "notes.json", notes)
        few = held_out_words(held_out.num_rows, num_prompts) if self.config.num_rounds else ""
        return (few,) if few else ()

    def train(self) -> pa.Table | None:
        """The training prompts; None where the run only evaluates."""
        data = self.config.data
        return self._prompts(self.given_train, data.prompts, data.split, "train", "data.prompts")

    def held_out(self) -> pa.Table | None:
        """The held-out prompts; None where they are to be split from the training prompts."""
        evaluation = self.config.evaluation
        return self._prompts(
            self.given_held_out, evaluation.prompts, evaluation.split, "held_out", "evaluation.prompts"
        )

    def _prompts(self, load: Source | None, source: str | None, split: str, part: str, field: str) -> pa.Table | None:
        """The prompts of a Python object, of a data set, or of this part of another run, with their ids there."""
        column, columns = self.config.data.prompt_column, self.config.data.columns
        if load is not None:
            return prepare(_renamed(load(), columns), column, field)
        if source is None:
            return None
        if not (run := RunFolder(Path(source).expanduser())).exists():
            return prepare(_renamed(read_rows(source, split, field), columns), column, field)
        path = run.folder(0, "data") / f"{part}.parquet"
        if path.is_file() and not run.is_committed(0, "data"):
            resume = shell_command("raftune", "resume", run.root)
            raise RunDamaged(f"{path.parent / COMMIT} is missing. Restore it, or write the stage anew with `{resume}`.")
        prompts = read_table(path) if path.is_file() else None
        if prompts is None or not prompts.num_rows:
            raise DataError(
                f"{field} names the run {source}, which has no {part.replace('_', '-')} prompts. Name a file, or "
                "another run."
            )
        return prompts


def _renamed(rows: pa.Table, columns: Mapping[str, str] | None) -> pa.Table:
    """The rows under the column names of `data.columns`. Raises DataError for a missing column."""
    for name, column in (columns or {}).items():
        if column not in rows.column_names:
            raise DataError(
                f"data.columns must name columns of the data; got {column!r} for {name!r}, and there are "
                f"{', '.join(rows.column_names)}. Name one of these."
            )
        if name in rows.column_names and name != column:
            rows = rows.drop_columns([name])
        rows = rows.rename_columns({column: name})
    return rows


def prepare(rows: pa.Table, column: str, field: str) -> pa.Table:
    """The rows with `prompt_id` and `prompt` first.

    Raises DataError for no rows, a missing or reserved column, and, naming the row, for a prompt that is not a text
    that is not blank, a list of messages, or a label.
    """
    if rows.num_rows == 0:
        raise DataError(f"{field} must hold at least one row; got none. Add prompts.")
    if column not in rows.column_names:
        raise DataError(
            f"{field} must have the column {column!r} (data.prompt_column); got {', '.join(rows.column_names)}. "
            "Rename the column, or name it with data.prompt_column."
        )
    clash = [name for name in rows.column_names if name in RESERVED and name != column and name != "completion"]
    if clash:
        raise DataError(f"{field} must not have a column named {clash[0]!r}: raftune writes it. Rename the column.")
    if "self" in rows.column_names:
        raise DataError(
            f"{field} must not have a column named 'self': rewards get columns as keyword arguments, and Python has "
            "that one. Rename it, or write data.columns: {itself: self}."
        )
    rows = _without_padding(rows, column)
    prompts = rows.column(column).combine_chunks()
    for number, content in enumerate(_values_of(prompts), 1):
        if isinstance(content, bool) or not isinstance(content, str | int | list):
            kind = "nothing" if content is None else type(content).__name__
            raise DataError(
                f"{field}: the prompt in row {number} must be text, messages or a class label; got {kind}. Fix the row."
            )
        if isinstance(content, str) and not content.strip():
            raise DataError(f"{field}: the prompt in row {number} must not be empty; got {content!r}. Remove the row.")
        if isinstance(content, list) and not (content and all(isinstance(m, dict) and m.get("role") for m in content)):
            raise DataError(
                f"{field}: the prompt in row {number} must be a list of messages, each with 'role' and 'content'; "
                f"got {str(content)[:60]}. Fix the row."
            )
    ids = pa.array(prompt_ids(_values_of(prompts)), pa.string())
    others = {name: rows.column(name) for name in rows.column_names if name != column}
    return pa.table({"prompt_id": ids, "prompt": prompts, **others})


def _without_padding(rows: pa.Table, column: str) -> pa.Table:
    """The rows, their messages and tools without the keys that Arrow added because other rows have them.

    An Arrow struct (of a `datasets.Dataset`, of Parquet) does not tell these from a None in the data, and templates
    test whether a key is there. Rows read from JSON or Python have the type JsonType, and stay.
    """
    for index, name in enumerate(rows.column_names):
        kind = rows.schema.field(index).type
        if name in (column, TOOLS) and kind != JsonType() and pa.types.is_nested(kind):
            values = rows.column(index)
            if any(without_none(value) != value for value in _values_of(values)):
                rows = rows.set_column(index, name, arrow_array([without_none(value) for value in _values_of(values)]))
    return rows


def _values_of(column: pa.Array | pa.ChunkedArray) -> Iterator[Any]:
    """The column's values, a few thousand of them at a time in memory."""
    for at in range(0, len(column), _AT_ONCE):
        yield from column.slice(at, _AT_ONCE).to_pylist()


def _content_of(prompt_id: str) -> str:
    """The part of the id that equal prompts share."""
    return prompt_id.rsplit("-", 1)[0]


def hold_out(train: pa.Table, num_prompts: int) -> tuple[pa.Table, pa.Table]:
    """Splits off about a tenth of the prompts, equal ones together, by their hash alone: the same in every run.

    Of fewer than fifty prompts it takes FEWEST_UNITS, so that a mean has an interval, but at most a third; of fewer
    than ten, or where all are equal, none.
    """
    contents = [_content_of(name) for name in train.column("prompt_id").to_pylist()]
    rows, share = train.num_rows, 0
    if len(set(contents)) > 1 and rows >= 10:
        share = min(num_prompts, max(rows // 10, min(FEWEST_UNITS, rows // 3)))
    order = np.argsort([derive_seed("hold out", content) for content in contents], kind="stable")
    chosen = {contents[i] for i in order[:share]}
    mask = pa.array([content in chosen for content in contents])
    return train.filter(pc.invert(mask)), train.filter(mask).slice(0, share)


def few_words(prompts: int) -> str:
    """A remark about a best round that this few held-out prompts chose."""
    return (
        f"by {counted(prompts, 'held-out prompt')}: too few to tell rounds apart; hold out {FEWEST_UNITS} at the "
        "least, better 16"
    )


def held_out_words(held_out: int, num_prompts: int) -> str:
    """A warning about few held-out prompts, or fewer than configured; empty where there are enough."""
    if not num_prompts or held_out >= max(FEWEST_UNITS, min(num_prompts, 2 * FEWEST_UNITS)):
        return ""
    if not held_out:
        return "no prompt is held out (fewer than 10, or all alike): rounds are not judged, and the last is published"
    few = f"; the best round is chosen {few_words(held_out)}" if held_out < FEWEST_UNITS else ""
    some = f"{held_out} of the {num_prompts} prompts that evaluation.num_prompts asks for"
    have = some if held_out < num_prompts else counted(held_out, "prompt")
    return f"{have} {'is' if held_out == 1 else 'are'} held out{few}"
