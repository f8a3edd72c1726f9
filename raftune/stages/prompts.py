"""Stage `prompts`: whether the start model can read every prompt, asked before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from raftune.errors import DataError, RaftuneError
from raftune.plain import one_line
from raftune.protocols import Inputs, PolicyShelf, Reader
from raftune.records import Prompt
from raftune.stages.data import Data
from raftune.stages.plan import asked_columns, prompts_from
from raftune.store.parquet import read_groups

NAMED = 3


class Prompts:
    """unread.json: of prompts that are longer than what the model reads, by id, the end that is not seen."""

    name = writes = "prompts"
    reads = ("data@0", "model@0")
    fields: tuple[str, ...] = ()

    def __init__(self, policies: PolicyShelf, data: Data) -> None:
        self.policies, self.data = policies, data

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: Inputs, out: Path) -> tuple[str, ...]:
        reader = self.policies.encoder(inputs["model@0"])
        assert isinstance(reader, Reader)  # the table of stages holds this one for no other
        prompts = list(prompts_in(inputs["data@0"]))
        try:
            unread = unread_ends(prompts, reader, self.data)
        except DataError as error:
            raise DataError(f"{error} Then add `--from data`.") from error
        (out / "unread.json").write_text(json.dumps(unread, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        return cut_short(prompts, unread)


def prompts_in(data: Path) -> Iterator[Prompt]:
    """All prompts of a run, those to learn from first, without the columns that ride along but for tools."""
    for name in ("train", "held_out"):
        path = data / f"{name}.parquet"
        for rows in read_groups(path, asked_columns(path)):
            yield from prompts_from(rows)


def unread_ends(prompts: Sequence[Prompt], reader: Reader, data: Data) -> dict[str, str]:
    """Of prompts that are not read to their end, by id, what is not seen.

    Raises DataError for prompts that cannot be read at all: how many, the rows of the first, and why.
    """
    unread: dict[str, str] = {}
    refused: list[str] = []
    why = ""
    for prompt in prompts:
        try:
            end = reader.unread(prompt)
        except DataError as error:
            refused.append(prompt.id)
            why = why or str(error)
        else:
            unread |= {} if end is None else {prompt.id: end}
    if refused:
        more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        where = f"{', '.join(places(refused[:NAMED], data))}{more}"
        raise DataError(f"{len(refused)} of {len(prompts)} prompts cannot be used ({where}): {why}")
    return unread


def places(ids: Sequence[str], data: Data) -> list[str]:
    """The row of each prompt in the data set that it came from; its id where that is no longer to be had."""
    rows: dict[str, str] = {}
    for field, read in (("data.prompts", data.train), ("evaluation.prompts", data.held_out)):
        try:
            table = read()
        except RaftuneError:  # read once before; what is gone since hides no error
            continue
        names = table.column("prompt_id").to_pylist() if table is not None else []
        rows = {name: f"row {number} of {field}" for number, name in enumerate(names, 1)} | rows
    return [rows.get(name, f"prompt {name}") for name in ids]


def cut_short(prompts: Sequence[Prompt], unread: Mapping[str, str]) -> tuple[str, ...]:
    """How many prompts are not read to their end, with one of them; nothing where all are."""
    if not unread:
        return ()
    name, end = next(iter(unread.items()))
    content = next(prompt.content for prompt in prompts if prompt.id == name)
    verb = "is" if len(unread) == 1 else "are"
    return (
        f"{len(unread)} of {len(prompts)} prompts {verb} longer than what the model reads; what follows is not seen: "
        f"{one_line(end, 60)!r} of {one_line(str(content), 40)!r}",
    )
