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
from raftune.store.parquet import column_names, read_groups

NAMED = 3


LEFT_OUT = "left_out.json"
LEAVE_OUT = "Or leave such prompts out: `sampling.unusable_prompts: drop`."
# What decides which prompts a language model takes; they shape the stage where prompts are left out.
DECIDED_BY = tuple(
    f"sampling.{name}"
    for name in (
        *("unusable_prompts", "max_prompt_length", "system_prompt", "few_shot_prefix", "chat_template_kwargs"),
        "candidate_columns",
    )
)


class Prompts:
    """unread.json: of prompts that are longer than what the model reads, by id, the end that is not seen.

    With `drop`, left_out.json: of those that it, or the teacher, cannot take at all, by id, the row and the reason.
    Without, they are refused.
    """

    name = writes = "prompts"

    def __init__(
        self,
        policies: PolicyShelf,
        data: Data,
        *,
        drop: bool = False,
        teacher: bool = False,
        columns: Sequence[str] = (),
        starter: bool = False,
    ) -> None:
        """`columns`: candidates that are looked at too; `starter`: the policy is the bundled one."""
        self.starter = starter
        self.policies, self.data, self.drop, self.columns = policies, data, drop, columns
        self.reads = ("data@0", "model@0", *(("teacher@0",) if teacher else ()))
        self.fields = DECIDED_BY if drop else ()

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: Inputs, out: Path) -> tuple[str, ...]:
        prompts = list(prompts_in(inputs["data@0"], self.columns))
        unread, refused = looked_at(prompts, [self.reader(inputs[name]) for name in self.reads[1:]])
        if refused and not self.drop:
            raise DataError(f"{refusal(prompts, refused, self.data)} Then add `--from data`. {LEAVE_OUT}")
        (out / "unread.json").write_text(json.dumps(unread, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        said = unlike_starter(prompts) if self.starter else ()
        if not self.drop:
            return (*said, *cut_short(prompts, unread))
        for name in ("train", "held_out"):
            ids = [prompt.id for prompt in prompts_of_file(inputs["data@0"] / f"{name}.parquet")]
            if ids and not {*ids} - refused.keys():
                raise DataError(f"{refusal(prompts, refused, self.data)} None is left of the {name} prompts.")
        rows = dict(zip(refused, places([*refused], self.data), strict=True))
        left_out = {name: {"row": rows[name], "why": why} for name, why in refused.items()}
        (out / LEFT_OUT).write_text(json.dumps(left_out, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
        gone = (f"left out: {refusal(prompts, refused, self.data)}",) if refused else ()
        return (*said, *gone, *cut_short(prompts, unread))

    def reader(self, folder: Path) -> Reader:
        reader = self.policies.encoder(folder)
        assert isinstance(reader, Reader)  # the table of stages holds this one for no other
        return reader


def prompts_in(data: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    """All prompts of a run, those to learn from first; of the columns that ride along, tools and those named."""
    for name in ("train", "held_out"):
        yield from prompts_of_file(data / f"{name}.parquet", columns if name == "train" else ())


def prompts_of_file(path: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    names = [*asked_columns(path), *(name for name in columns if name in column_names(path))]
    for rows in read_groups(path, names):
        yield from prompts_from(rows)


def looked_at(prompts: Sequence[Prompt], readers: Sequence[Reader]) -> tuple[dict[str, str], dict[str, str]]:
    """By id: of prompts that are not read to their end, what is not seen; of those that cannot be taken, why."""
    unread: dict[str, str] = {}
    refused: dict[str, str] = {}
    for prompt in prompts:
        for number, reader in enumerate(readers):
            try:
                end = reader.unread(prompt)
            except DataError as error:
                refused[prompt.id] = f"{error}" if not number else f"The teacher: {error}"
                break
            if end is not None and not number:
                unread[prompt.id] = end
    return unread, refused


def refusal(prompts: Sequence[Prompt], refused: Mapping[str, str], data: Data) -> str:
    """How many prompts cannot be used, the rows of the first, and why the first cannot."""
    more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    where = f"{', '.join(places([*refused][:NAMED], data))}{more}"
    return f"{len(refused)} of {len(prompts)} prompts cannot be used ({where}): {next(iter(refused.values()))}"


def unread_ends(prompts: Sequence[Prompt], reader: Reader, data: Data) -> dict[str, str]:
    """Of prompts that are not read to their end, by id, what is not seen. Raises DataError for those it cannot take."""
    unread, refused = looked_at(prompts, [reader])
    if refused:
        raise DataError(refusal(prompts, refused, data))
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


def unlike_starter(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """How many prompts the bundled model was not trained to answer; nothing where all have its form."""
    unlike = [p for p in prompts if not (str(p.content).startswith("User: ") and str(p.content).endswith("Assistant:"))]
    if not unlike:
        return ()
    return (
        f"{len(unlike)} of {len(prompts)} prompts are not of the form that the bundled model answers, 'User: …⏎"
        f"Assistant:' (such as {one_line(str(unlike[0].content), 40)!r}); many of its answers will be empty",
    )


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
