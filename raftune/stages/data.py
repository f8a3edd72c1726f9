"""Stage `data`: copies the prompts into the run and gives them ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.config.evaluation import FEWEST_UNITS
from raftune.config.run import RunConfig
from raftune.data.tables import read_rows
from raftune.errors import DataError, RunDamaged
from raftune.protocols import StageInputs
from raftune.records import TOOLS, JsonType, arrow_array, derive_seed, prompt_ids, without_none
from raftune.sanitize import counted, shell_command
from raftune.stages.reference import check_references
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import dump_json
from raftune.store.parquet import read_table, write_table
from raftune.store.run import RunFolder

RESERVED = ("prompt_id", "prompt", "sample_id", "completion")
AT_ONCE = 4096  # values
Source = Callable[[], pa.Table]


class DataStage:
    """Reads, checks and splits the prompts: train.parquet and held_out.parquet, each with prompt_id and prompt."""

    name = writes = "data"
    reads: tuple[str, ...] = ()
    fields = ("data", "evaluation.prompts", "evaluation.split", "evaluation.num_prompts")

    def __init__(self, config: RunConfig, train: Source | None = None, held_out: Source | None = None) -> None:
        self.config, self.given_train, self.given_held_out = config, train, held_out

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        data, evaluation = self.config.data, self.config.evaluation
        wanted = evaluation.num_prompts
        train, held_out = self.train(), self.held_out() if wanted else None
        if train is not None and data.limit is not None:
            train = train.slice(0, data.limit)
        if held_out is not None:
            held_out = held_out.slice(0, wanted)
            train = held_out.slice(0, 0) if train is None else train
        else:
            assert train is not None  # the configuration names one or the other
            train, held_out = hold_out(train, wanted)
        for column in self.config.sampling.candidate_columns if self.config.num_rounds else ():
            if column not in train.column_names:
                raise DataError(
                    f"sampling.candidate_columns names {column!r}, which the prompts lack; they have "
                    f"{', '.join(train.column_names[1:])}. Name one of these, or leave it out."
                )
        if evaluation.reference_column is not None:
            check_references(held_out, evaluation.reference_column)
        write_table(train, out / "train.parquet")
        write_table(held_out, out / "held_out.parquet")
        notes = {"train": train.num_rows, "held_out": held_out.num_rows, **repeated(train), **overlap(train, held_out)}
        dump_json(out / "notes.json", notes)
        few = held_out_words(held_out.num_rows, wanted) if self.config.num_rounds else ""
        return (few,) if few else ()

    def train(self) -> pa.Table | None:
        """The prompts to learn from; None where the run has none, for it only judges."""
        data = self.config.data
        if self.given_train is not None:
            return prepare(renamed(self.given_train(), data.columns), data.prompt_column, "data.prompts")
        return read_prompts(data.prompts, data.split, "train", data.prompt_column, "data.prompts", data.columns)

    def held_out(self) -> pa.Table | None:
        """The prompts to judge by; None where they are to be taken from the prompts to learn from."""
        evaluation, data = self.config.evaluation, self.config.data
        column, field = data.prompt_column, "evaluation.prompts"
        if self.given_held_out is not None:
            return prepare(renamed(self.given_held_out(), data.columns), column, field)
        return read_prompts(evaluation.prompts, evaluation.split, "held_out", column, field, data.columns)


def renamed(rows: pa.Table, columns: Mapping[str, str] | None) -> pa.Table:
    """The rows under the names that `data.columns` gives. Raises DataError for a column that is not there."""
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


def read_prompts(
    source: str | None, split: str, own: str, column: str, field: str, columns: Mapping[str, str] | None = None
) -> pa.Table | None:
    """The prompts of a data set, or a run's `own` ones, `train` or `held_out`, under the ids that they have there."""
    if source is None:
        return None
    if not (run := RunFolder(Path(source).expanduser())).exists():
        return prepare(renamed(read_rows(source, split, field), columns), column, field)
    path = run.folder(0, "data") / f"{own}.parquet"
    if path.is_file() and not run.is_committed(0, "data"):
        again = shell_command("raftune", "resume", run.root)
        raise RunDamaged(f"{path.parent / COMMIT} is missing. Restore it, or write the stage anew with `{again}`.")
    prompts = read_table(path) if path.is_file() else None
    if prompts is None or not prompts.num_rows:
        raise DataError(
            f"{field} names the run {source}, which has no {own.replace('_', '-')} prompts. Name a file, or another "
            "run."
        )
    return prompts


def prepare(rows: pa.Table, column: str, field: str) -> pa.Table:
    """The rows with `prompt_id` and `prompt` first. Raises DataError for no rows, no such column, an empty prompt."""
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
    rows = without_padding(rows, column)
    prompts = rows.column(column).combine_chunks()
    check_contents(values_of(prompts), field)
    ids = pa.array(prompt_ids(values_of(prompts)), pa.string())
    rest = [name for name in rows.column_names if name != column]
    return pa.table({"prompt_id": ids, "prompt": prompts, **{name: rows.column(name) for name in rest}})


def without_padding(rows: pa.Table, column: str) -> pa.Table:
    """The rows, their messages and tools without the keys that Arrow gave them because others have them.

    A structure of Arrow's (of a `datasets.Dataset`, of Parquet) does not tell those from a None that somebody wrote;
    templates ask whether a key is there. What was read from JSON or Python's own rows is JSON here, and stays.
    """
    for place, name in enumerate(rows.column_names):
        kind = rows.schema.field(place).type
        if name in (column, TOOLS) and kind != JsonType() and pa.types.is_nested(kind):
            column = rows.column(place)
            if any(without_none(value) != value for value in values_of(column)):
                cleaned = [without_none(value) for value in values_of(column)]
                rows = rows.set_column(place, name, arrow_array(cleaned))
    return rows


def values_of(column: pa.Array | pa.ChunkedArray) -> Iterator[Any]:
    """The column's values, a few thousand of them at a time in memory."""
    for at in range(0, len(column), AT_ONCE):
        yield from column.slice(at, AT_ONCE).to_pylist()


def check_contents(contents: Iterable[Any], field: str) -> None:
    """Raises DataError that names the row: a prompt is a text that is not blank, a list of messages, or a label."""
    for number, content in enumerate(contents, 1):
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


def hold_out(train: pa.Table, wanted: int) -> tuple[pa.Table, pa.Table]:
    """Takes about a tenth of the prompts off, equal ones together, by their hash alone: the same in every run.

    Of fewer than fifty it takes FEWEST_UNITS, so that a mean can have an interval, but no more than a third; of fewer
    than ten none. Where all prompts are equal, none is held out, so that something is left to learn from.
    """
    stems = [name.rsplit("-", 1)[0] for name in train.column("prompt_id").to_pylist()]
    rows = train.num_rows
    share = min(wanted, max(rows // 10, min(FEWEST_UNITS, rows // 3))) if len(set(stems)) > 1 and rows >= 10 else 0
    order = np.argsort([derive_seed("hold out", stem) for stem in stems], kind="stable")
    chosen = {stems[i] for i in order[:share]}
    mask = pa.array([stem in chosen for stem in stems])
    return train.filter(pc.invert(mask)), train.filter(mask).slice(0, share)


def repeated(train: pa.Table) -> dict[str, int]:
    """How many rows repeat the prompt of an earlier row."""
    ids = train.column("prompt_id").to_pylist()
    return {"repeated": sum(1 for name in ids if not name.endswith("-0"))}


def overlap(train: pa.Table, held_out: pa.Table) -> dict[str, int]:
    """How many held-out prompts are also training prompts."""
    stems = Counter(name.rsplit("-", 1)[0] for name in train.column("prompt_id").to_pylist())
    return {"overlap": sum(1 for name in held_out.column("prompt_id").to_pylist() if name.rsplit("-", 1)[0] in stems)}


def few_words(prompts: int) -> str:
    """What is to be known of a best round that so few held-out prompts chose."""
    named = counted(prompts, "held-out prompt")
    return f"by {named}: too few to tell rounds apart; hold out {FEWEST_UNITS} at the least, better 16"


def held_out_words(held_out: int, wanted: int) -> str:
    """A warning that the policy is judged by few prompts, or by fewer than were asked for; empty where it is not."""
    if not wanted or held_out >= max(FEWEST_UNITS, min(wanted, 2 * FEWEST_UNITS)):
        return ""
    if not held_out:
        return "no prompt is held out (fewer than 10, or all alike): rounds are not judged, and the last is published"
    few = f"; the best round is chosen {few_words(held_out)}" if held_out < FEWEST_UNITS else ""
    some = f"{held_out} of the {wanted} prompts that evaluation.num_prompts asks for"
    have = some if held_out < wanted else counted(held_out, "prompt")
    return f"{have} {'is' if held_out == 1 else 'are'} held out{few}"
