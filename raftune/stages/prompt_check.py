"""Stage `prompts`: checks that the initial model can read every prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raftune.errors import DataError, RaftuneError
from raftune.protocols import BatchReader, PolicyProvider, SingleStage, StageInputs, SupportsPromptCheck
from raftune.records import Prompt
from raftune.sanitize import counted, one_line
from raftune.stages.data import DataStage
from raftune.stages.plan import prompt_columns, prompts_from
from raftune.store.files import json_bytes
from raftune.store.parquet import column_names, read_groups

_NAMED = 3
_BATCH = 512  # prompts that are checked together
LEAVE_OUT = "Or leave such prompts out: `sampling.unusable_prompts: drop`."


class PromptCheckStage(SingleStage):
    """unread.json: by id, the unseen end of prompts that are longer than what the model reads.

    With `drop`, left_out.json: by id, the row and the reason of those that it, or the teacher, cannot use at all.
    Without, these are an error.
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
        """`columns`: candidates that are checked too; `starter`: the policy is the bundled one."""
        self.policies, self.data, self.drop, self.columns, self.starter = policies, data, drop, columns, starter
        self.reads = ("data@0", "model@0", *(("teacher@0",) if teacher else ()))
        if drop:
            names = ("unusable_prompts", "max_prompt_length", "system_prompt", "few_shot_prefix")
            self.fields = tuple(f"sampling.{name}" for name in (*names, "chat_template_kwargs", "candidate_columns"))

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        readers = []
        for name in self.reads[1:]:
            reader = self.policies.encoder(inputs[name])
            assert isinstance(reader, SupportsPromptCheck)  # the table of stages has made sure of it
            readers.append(reader)
        result = check_prompts(prompts_in(inputs["data@0"], self.columns), readers)
        refused = result.refused
        if refused and not self.drop:
            raise DataError(f"{refusal(result, self.data)} Then add `--from data`. {LEAVE_OUT}")
        (out / "unread.json").write_bytes(json_bytes(result.unread))
        notes = unlike_starter(result) if self.starter else ()
        if self.drop:
            for name in ("train", "held_out") if refused else ():
                groups = read_groups(inputs["data@0"] / f"{name}.parquet", ["prompt_id"])
                ids = {prompt_id for rows in groups for prompt_id in rows.column("prompt_id").to_pylist()}
                if ids and ids <= refused.keys():
                    raise DataError(f"{refusal(result, self.data)} None is left of the {name} prompts.")
            rows = zip(refused, _places([*refused], self.data), strict=True)
            left_out = {name: {"row": row, "why": refused[name]} for name, row in rows}
            (out / "left_out.json").write_bytes(json_bytes(left_out))
            notes += (f"left out: {refusal(result, self.data)}",) if refused else ()
        return (*notes, *cut_short(result))


def prompts_in(data: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    """All prompts of a run, training prompts first, with tools and the named columns."""
    yield from prompts_of_file(data / "train.parquet", columns)
    yield from prompts_of_file(data / "held_out.parquet")


def prompts_of_file(path: Path, columns: Sequence[str] = ()) -> Iterator[Prompt]:
    names = [*prompt_columns(path), *(name for name in columns if name in column_names(path))]
    for rows in read_groups(path, names):
        yield from prompts_from(rows)


@dataclass
class PromptCheck:
    """The result of checking prompts one after another, of which none is kept in memory."""

    total: int = 0
    unread: dict[str, str] = field(default_factory=dict)  # by id, the end of prompts that are not read whole
    refused: dict[str, str] = field(default_factory=dict)  # by id, why a prompt cannot be used
    unlike: int = 0  # prompts not of the form that the bundled model answers
    first_unread: str = ""
    first_unlike: str = ""


def check_prompts(prompts: Iterable[Prompt], readers: Sequence[SupportsPromptCheck]) -> PromptCheck:
    """Checks the prompts with each reader (the policy, then the teacher), in batches where it can."""
    result, rest = PromptCheck(), iter(prompts)
    while batch := list(itertools.islice(rest, _BATCH)):
        one_by_one = [
            (number, reader)
            for number, reader in enumerate(readers)
            if not (isinstance(reader, BatchReader) and reader.reads_all(batch))
        ]
        for prompt in batch:
            result.total += 1
            text = str(prompt.content)
            if not (text.startswith("User: ") and text.endswith("Assistant:")):
                result.unlike += 1
                result.first_unlike = result.first_unlike or text
            for number, reader in one_by_one:
                try:
                    end = reader.unread(prompt)
                except DataError as error:
                    result.refused[prompt.id] = f"{error}" if not number else f"The teacher: {error}"
                    break
                if end is not None and not number:
                    result.first_unread = result.first_unread if result.unread else text
                    result.unread[prompt.id] = end
    return result


def refusal(result: PromptCheck, data: DataStage) -> str:
    """How many prompts cannot be used, the rows of the first, and why the first cannot."""
    refused = result.refused
    more = f" and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
    names = f"{', '.join(_places([*refused][:_NAMED], data))}{more}"
    return (
        f"{len(refused)} of {counted(result.total, 'prompt')} cannot be used ({names}): {next(iter(refused.values()))}"
    )


def _places(ids: Sequence[str], data: DataStage) -> list[str]:
    """The row of each prompt in the data set that it came from; its id where that cannot be read any more."""
    rows: dict[str, str] = {}
    for name, read in (("data.prompts", data.train), ("evaluation.prompts", data.held_out)):
        try:
            table = read()
        except RaftuneError:  # it was read before; its error must not hide this one
            continue
        names = table.column("prompt_id").to_pylist() if table is not None else []
        rows = {prompt_id: f"row {number} of {name}" for number, prompt_id in enumerate(names, 1)} | rows
    return [rows.get(name, f"prompt {name}") for name in ids]


def unlike_starter(result: PromptCheck) -> tuple[str, ...]:
    """A note on how many prompts do not have the form that the bundled model was trained on."""
    if not result.unlike:
        return ()
    return (
        f"{result.unlike} of {counted(result.total, 'prompt')} are not of the form that the bundled model answers, "
        f"'User: …⏎Assistant:' (such as {one_line(result.first_unlike, 40)!r}); many of its completions will be empty",
    )


def cut_short(result: PromptCheck) -> tuple[str, ...]:
    """A note on how many prompts are not read to their end, with one of them."""
    if not result.unread:
        return ()
    end = next(iter(result.unread.values()))
    verb = "is" if len(result.unread) == 1 else "are"
    return (
        f"{len(result.unread)} of {counted(result.total, 'prompt')} {verb} longer than what the model reads; what "
        f"follows is not seen: {one_line(end, 60)!r} of {one_line(result.first_unread, 40)!r}",
    )
