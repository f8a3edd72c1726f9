"""Stage `prompts`: checks that the initial model can read every prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raftune.errors import DataError, RaftuneError
from raftune.protocols import BatchReader, PolicyProvider, StageInputs, SupportsPromptCheck
from raftune.records import Prompt
from raftune.sanitize import counted, one_line
from raftune.stages.data import DataStage
from raftune.stages.plan import asked_columns, prompts_from
from raftune.store.files import json_bytes
from raftune.store.parquet import column_names, read_groups

NAMED = 3
BATCH = 512  # prompts that are looked at together


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


class PromptCheckStage:
    """unread.json: of prompts that are longer than what the model reads, by id, the end that is not seen.

    With `drop`, left_out.json: of those that it, or the teacher, cannot take at all, by id, the row and the reason.
    Without, they are refused.
    """

    name = writes = "prompts"

    def __init__(
        self,
        policies: PolicyProvider,
        data: DataStage,
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

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        readers = [self.reader(inputs[name]) for name in self.reads[1:]]
        looks = looked_at(prompts_in(inputs["data@0"], self.columns), readers)
        refused = looks.refused
        if refused and not self.drop:
            raise DataError(f"{refusal(looks, self.data)} Then add `--from data`. {LEAVE_OUT}")
        (out / "unread.json").write_bytes(json_bytes(looks.unread))
        said = unlike_starter(looks) if self.starter else ()
        if not self.drop:
            return (*said, *cut_short(looks))
        for name in ("train", "held_out"):
            ids = ids_in(inputs["data@0"] / f"{name}.parquet") if refused else set()
            if ids and not ids - refused.keys():
                raise DataError(f"{refusal(looks, self.data)} None is left of the {name} prompts.")
        rows = dict(zip(refused, places([*refused], self.data), strict=True))
        left_out = {name: {"row": rows[name], "why": why} for name, why in refused.items()}
        (out / LEFT_OUT).write_bytes(json_bytes(left_out))
        gone = (f"left out: {refusal(looks, self.data)}",) if refused else ()
        return (*said, *gone, *cut_short(looks))

    def reader(self, folder: Path) -> SupportsPromptCheck:
        reader = self.policies.encoder(folder)
        assert isinstance(reader, SupportsPromptCheck)  # the table of stages holds this one for no other
        return reader


def prompts_in(data: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    """All prompts of a run, those to learn from first; of the columns that ride along, tools and those named."""
    for name in ("train", "held_out"):
        yield from prompts_of_file(data / f"{name}.parquet", columns if name == "train" else ())


def prompts_of_file(path: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    names = [*asked_columns(path), *(name for name in columns if name in column_names(path))]
    for rows in read_groups(path, names):
        yield from prompts_from(rows)


def ids_in(path: Path) -> set[str]:
    return {name for rows in read_groups(path, ["prompt_id"]) for name in rows.column("prompt_id").to_pylist()}


@dataclass
class PromptCheck:
    """What was seen of prompts that were read one after another, none of them kept."""

    total: int = 0
    unread: dict[str, str] = field(default_factory=dict)  # by id, what is not seen of prompts not read to their end
    refused: dict[str, str] = field(default_factory=dict)  # by id, why a prompt cannot be taken
    unlike: int = 0  # not of the form that the bundled model answers
    first_unread: str = ""
    first_unlike: str = ""


def looked_at(prompts: Iterable[Prompt], readers: Sequence[SupportsPromptCheck]) -> PromptCheck:
    looks = PromptCheck()
    for prompt, asked in prompts_with_readers(prompts, readers):
        looks.total += 1
        text = str(prompt.content)
        if not (text.startswith("User: ") and text.endswith("Assistant:")):
            looks.unlike += 1
            looks.first_unlike = looks.first_unlike or text
        for number, reader in asked:
            try:
                end = reader.unread(prompt)
            except DataError as error:
                looks.refused[prompt.id] = f"{error}" if not number else f"The teacher: {error}"
                break
            if end is not None and not number:
                looks.first_unread = looks.first_unread if looks.unread else text
                looks.unread[prompt.id] = end
    return looks


def prompts_with_readers(
    prompts: Iterable[Prompt], readers: Sequence[SupportsPromptCheck]
) -> Iterator[tuple[Prompt, list[tuple[int, SupportsPromptCheck]]]]:
    """Each prompt with the numbered readers that have to look at it alone: those that did not read its whole batch."""
    rest = iter(prompts)
    while batch := list(itertools.islice(rest, BATCH)):
        alone = [
            (number, reader)
            for number, reader in enumerate(readers)
            if not (isinstance(reader, BatchReader) and reader.reads_all(batch))
        ]
        for prompt in batch:
            yield prompt, alone


def refusal(looks: PromptCheck, data: DataStage) -> str:
    """How many prompts cannot be used, the rows of the first, and why the first cannot."""
    refused = looks.refused
    more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    where = f"{', '.join(places([*refused][:NAMED], data))}{more}"
    return (
        f"{len(refused)} of {counted(looks.total, 'prompt')} cannot be used ({where}): {next(iter(refused.values()))}"
    )


def places(ids: Sequence[str], data: DataStage) -> list[str]:
    """The row of each prompt in the data set that it came from; its id where that is no longer to be had."""
    rows: dict[str, str] = {}
    for name, read in (("data.prompts", data.train), ("evaluation.prompts", data.held_out)):
        try:
            table = read()
        except RaftuneError:  # read once before; what is gone since hides no error
            continue
        names = table.column("prompt_id").to_pylist() if table is not None else []
        rows = {prompt_id: f"row {number} of {name}" for number, prompt_id in enumerate(names, 1)} | rows
    return [rows.get(name, f"prompt {name}") for name in ids]


def unlike_starter(looks: PromptCheck) -> tuple[str, ...]:
    """How many prompts the bundled model was not trained to answer; nothing where all have its form."""
    if not looks.unlike:
        return ()
    return (
        f"{looks.unlike} of {counted(looks.total, 'prompt')} are not of the form that the bundled model answers, "
        f"'User: …⏎Assistant:' (such as {one_line(looks.first_unlike, 40)!r}); many of its answers will be empty",
    )


def cut_short(looks: PromptCheck) -> tuple[str, ...]:
    """How many prompts are not read to their end, with one of them; nothing where all are."""
    if not looks.unread:
        return ()
    end = next(iter(looks.unread.values()))
    verb = "is" if len(looks.unread) == 1 else "are"
    return (
        f"{len(looks.unread)} of {counted(looks.total, 'prompt')} {verb} longer than what the model reads; what "
        f"follows is not seen: {one_line(end, 60)!r} of {one_line(looks.first_unread, 40)!r}",
    )
