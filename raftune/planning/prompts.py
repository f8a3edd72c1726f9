"""Reads and checks the prompts of a planned run, as its first stage will."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.errors import DataError
from raftune.protocols import Policy, SupportsPromptCheck
from raftune.records import Prompt
from raftune.results.summary import read_json
from raftune.runtime.assembly import Runtime
from raftune.sanitize import counted
from raftune.stages.data import DataStage
from raftune.stages.gather import adopted, prompts_of, reference_rows
from raftune.stages.plan import asked_columns, prompts_from
from raftune.stages.prompt_check import LEAVE_OUT, cut_short, looked_at, prompts_in, refusal, unlike_starter
from raftune.store.job import run_once
from raftune.store.parquet import read_groups, read_metadata, read_table, write_table

NAMED = 3
BATCH = 512  # prompts that are encoded at once


@dataclass(frozen=True)
class PromptCounts:
    """Numbers of prompts; `repeated`: training rows that repeat an earlier one; `overlap`: held-out prompts that are
    also trained on; `shortest` and `longest` in tokens, None where the family has none."""

    train: int
    held_out: int
    repeated: int
    overlap: int
    shortest: int | None
    longest: int | None


def read_prompts(assembly: Runtime) -> Path:
    """Copies the prompts into the assembly's run, and returns where they lie. Raises DataError."""
    stage = assembly.stage(0, "data")
    run_once(assembly.job(stage, 0), stage)  # type: ignore[arg-type]
    return assembly.run.folder(0, "data")


def check_answers(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Encodes every answer that the data holds, candidates and references, as the run will. Raises DataError for the
    first that cannot be used."""
    columns = config.sampling.candidate_columns if config.num_rounds else ()
    if columns:
        for prompt in (p for rows in read_groups(folder / "train.parquet") for p in prompts_from(rows)):
            for column in columns:
                try:
                    policy.encode_completion(prompt, prompt.columns[column], f"column:{column}")
                except DataError as error:
                    raise DataError(f"sampling.candidate_columns, {column!r} of prompt {prompt.id}: {error}") from error
    if config.num_rounds and (reference := config.training.reference) is not None:
        rows = reference_rows(reference)
        prompts = prompts_from(prompts_of(rows, reference))
        answers = rows.column(reference.completion_column).to_pylist()
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
            adopted(policy, prompt, answer, number)


def leave_out(assembly: Runtime, folder: Path, policy: SupportsPromptCheck) -> tuple[str, ...]:
    """Removes what the policy cannot take from the copied prompts, and says so; or raises DataError, as a run does."""
    source = assembly.stage(0, "data")
    assert isinstance(source, DataStage)
    looks = looked_at(prompts_in(folder, assembly.config.sampling.candidate_columns), [policy])
    refused = looks.refused
    said = (*(unlike_starter(looks) if assembly.starter else ()), *cut_short(looks))
    if not refused:
        return said
    if not assembly.drops:
        raise DataError(f"{refusal(looks, source)} {LEAVE_OUT}")
    tables = {name: read_table(folder / f"{name}.parquet") for name in ("train", "held_out")}
    (folder / "_COMMIT.json").unlink(missing_ok=True)  # a plan's own copy, which is not what was committed any more
    for name, rows in tables.items():
        path = folder / f"{name}.parquet"
        kept = rows.filter(pa.array([one not in refused for one in rows.column("prompt_id").to_pylist()], pa.bool_()))
        if rows.num_rows and not kept.num_rows:
            raise DataError(f"{refusal(looks, source)} None is left of the {name} prompts.")
        write_table(kept, path)
    notes = read_json(folder / "notes.json")
    counts = {name: read_metadata(folder / f"{name}.parquet")[0] for name in ("train", "held_out")}
    (folder / "notes.json").write_text(json.dumps(notes | counts))
    return (*said, f"left out: {refusal(looks, source)}")


def measure(folder: Path, encoder: Any | None) -> PromptCounts:
    """The numbers. Raises DataError that names prompts which do not fit the model."""
    notes = read_json(folder / "notes.json")
    lengths: list[int] = []
    if encoder is not None:
        for name in ("train", "held_out"):
            lengths += lengths_of(folder / f"{name}.parquet", encoder)
    return PromptCounts(
        train=notes["train"],
        held_out=notes["held_out"],
        repeated=notes["repeated"],
        overlap=notes["overlap"],
        shortest=min(lengths, default=None),
        longest=max(lengths, default=None),
    )


def lengths_of(path: Path, encoder: Any) -> list[int]:
    """Tokens of each of the file's prompts, as it is put when generating. Raises DataError that counts what does not
    fit.

    Encoded in batches: a tokenizer's own record of a text is many times larger than the text.
    """
    lengths: list[int] = []
    refused: list[str] = []
    first: DataError | None = None
    for rows in read_groups(path, asked_columns(path)):
        for at in range(0, rows.num_rows, BATCH):
            prompts = prompts_from(rows.slice(at, BATCH))
            try:
                lengths += map(len, encoder.encode(prompts, for_drawing=True))
            except DataError as error:
                first = first or error
                refused += [prompt.id for prompt in prompts if not fits(prompt, encoder)]
    if first is not None:
        more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        where = f"{', '.join(refused[:NAMED])}{more}"
        raise DataError(
            f"{len(refused)} of {counted(read_metadata(path)[0], 'prompt')} cannot be used ({where}). {first}"
        ) from first
    return lengths


def fits(prompt: Prompt, encoder: Any) -> bool:
    try:
        encoder.encode([prompt], for_drawing=True)
    except DataError:
        return False
    return True
