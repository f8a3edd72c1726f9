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
from raftune.results.summary import read_json
from raftune.runtime.assembly import Runtime
from raftune.stages.data import DataStage
from raftune.stages.gather import adopted, prompts_of, reference_rows
from raftune.stages.plan import asked_columns, prompts_from
from raftune.stages.prompt_check import LEAVE_OUT, cut_short, looked_at, prompts_in, refusal, unlike_starter
from raftune.store.job import run_once
from raftune.store.parquet import read_groups, read_table, write_table

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


def read_prompts(runtime: Runtime) -> Path:
    """Copies the prompts into the runtime's run; returns their folder. Raises DataError."""
    stage = runtime.stage(0, "data")
    run_once(runtime.job(stage, 0), stage)  # type: ignore[arg-type]
    return runtime.run.folder(0, "data")


def check_answers(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Encodes every completion of the data, candidates and references, as the run will. Raises DataError for the first
    that cannot be used."""
    if not config.num_rounds:
        return
    if columns := config.sampling.candidate_columns:
        for prompt in (p for rows in read_groups(folder / "train.parquet") for p in prompts_from(rows)):
            for column in columns:
                try:
                    policy.encode_completion(prompt, prompt.columns[column], f"column:{column}")
                except DataError as error:
                    raise DataError(f"sampling.candidate_columns, {column!r} of prompt {prompt.id}: {error}") from error
    if (reference := config.training.reference) is not None:
        rows = reference_rows(reference)
        completions = rows.column(reference.completion_column).to_pylist()
        prompts = prompts_from(prompts_of(rows, reference))
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            adopted(policy, prompt, completion, number)


def leave_out(runtime: Runtime, folder: Path, policy: SupportsPromptCheck) -> tuple[str, ...]:
    """Removes the copied prompts that the policy cannot take; returns notes. Raises DataError where a run would."""
    source = runtime.stage(0, "data")
    assert isinstance(source, DataStage)
    looks = looked_at(prompts_in(folder, runtime.config.sampling.candidate_columns), [policy])
    refused = looks.refused
    notes = (*(unlike_starter(looks) if runtime.starter else ()), *cut_short(looks))
    if not refused:
        return notes
    if not runtime.drops:
        raise DataError(f"{refusal(looks, source)} {LEAVE_OUT}")
    tables = {name: read_table(folder / f"{name}.parquet") for name in ("train", "held_out")}
    (folder / "_COMMIT.json").unlink(missing_ok=True)  # the plan's own copy, which is about to change
    counts = {}
    for name, rows in tables.items():
        kept = rows.filter(pa.array([id_ not in refused for id_ in rows.column("prompt_id").to_pylist()], pa.bool_()))
        if rows.num_rows and not kept.num_rows:
            raise DataError(f"{refusal(looks, source)} None is left of the {name} prompts.")
        write_table(kept, folder / f"{name}.parquet")
        counts[name] = kept.num_rows
    (folder / "notes.json").write_text(json.dumps(read_json(folder / "notes.json") | counts))
    return (*notes, f"left out: {refusal(looks, source)}")


def measure(folder: Path, encoder: Any | None) -> PromptCounts:
    """The counts; with an encoder, lengths as well."""
    notes = read_json(folder / "notes.json")
    files = (folder / f"{name}.parquet" for name in ("train", "held_out")) if encoder is not None else ()
    lengths = [length for path in files for length in lengths_of(path, encoder)]
    counts = {name: notes[name] for name in ("train", "held_out", "repeated", "overlap")}
    return PromptCounts(**counts, shortest=min(lengths, default=None), longest=max(lengths, default=None))


def lengths_of(path: Path, encoder: Any) -> list[int]:
    """Tokens of each of the file's prompts, as rendered for generation. Raises DataError for one that does not fit.

    Encoded in batches: a tokenizer's own record of a text is many times larger than the text.
    """
    lengths: list[int] = []
    for rows in read_groups(path, asked_columns(path)):
        for start in range(0, rows.num_rows, BATCH):
            lengths += map(len, encoder.encode(prompts_from(rows.slice(start, BATCH)), for_drawing=True))
    return lengths
