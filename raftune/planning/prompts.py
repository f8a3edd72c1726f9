"""The data of a run, read and checked as its first stage will."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.build import Assembly
from raftune.config.run import RunConfig
from raftune.digest import read_json
from raftune.errors import DataError
from raftune.protocols import Policy, Reader
from raftune.records import Prompt
from raftune.stages.data import Data
from raftune.stages.gather import adopted, prompts_of, reference_rows
from raftune.stages.plan import asked_columns, prompts_from
from raftune.stages.prompts import LEAVE_OUT, looked_at, prompts_in, refusal, unlike_starter
from raftune.store.job import run_once
from raftune.store.parquet import read_metadata, read_table, write_table

NAMED = 3


@dataclass(frozen=True)
class Prompts:
    """Numbers of prompts; `repeated`: training rows that repeat an earlier one; `overlap`: held-out prompts that are
    also trained on; `shortest` and `longest` in tokens, None where the family has none."""

    train: int
    held_out: int
    repeated: int
    overlap: int
    shortest: int | None
    longest: int | None


def read_prompts(assembly: Assembly) -> Path:
    """Copies the prompts into the assembly's run, and returns where they lie. Raises DataError."""
    stage = assembly.stage(0, "data")
    run_once(assembly.job(stage, 0), stage)  # type: ignore[arg-type]
    return assembly.run.folder(0, "data")


def check_answers(policy: Policy, folder: Path, config: RunConfig) -> None:
    """Encodes every answer that the data holds, candidates and references, as the run will. Raises DataError for the
    first that cannot be used."""
    columns = config.sampling.candidate_columns if config.num_rounds else ()
    if columns:
        for prompt in prompts_from(read_table(folder / "train.parquet")):
            for column in columns:
                try:
                    policy.adopt(prompt, prompt.columns[column], f"column:{column}")
                except DataError as error:
                    raise DataError(f"sampling.candidate_columns, {column!r} of prompt {prompt.id}: {error}") from error
    if config.num_rounds and (reference := config.tuning.reference) is not None:
        rows = reference_rows(reference)
        prompts = prompts_from(prompts_of(rows, reference))
        answers = rows.column(reference.completion_column).to_pylist()
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
            adopted(policy, prompt, answer, number)


def leave_out(assembly: Assembly, folder: Path, policy: Reader) -> tuple[str, ...]:
    """Removes what the policy cannot take from the copied prompts, and says so; or raises DataError, as a run does."""
    source = assembly.stage(0, "data")
    assert isinstance(source, Data)
    prompts = list(prompts_in(folder, assembly.config.sampling.candidate_columns))
    _, refused = looked_at(prompts, [policy])
    said = unlike_starter(prompts) if assembly.starter else ()
    if not refused:
        return said
    if not assembly.drops:
        raise DataError(f"{refusal(prompts, refused, source)} {LEAVE_OUT}")
    tables = {name: read_table(folder / f"{name}.parquet") for name in ("train", "held_out")}
    (folder / "_COMMIT.json").unlink(missing_ok=True)  # a plan's own copy, which is not what was committed any more
    for name, rows in tables.items():
        path = folder / f"{name}.parquet"
        kept = rows.filter(pa.array([one not in refused for one in rows.column("prompt_id").to_pylist()], pa.bool_()))
        if rows.num_rows and not kept.num_rows:
            raise DataError(f"{refusal(prompts, refused, source)} None is left of the {name} prompts.")
        write_table(kept, path)
    notes = read_json(folder / "notes.json")
    counts = {name: read_metadata(folder / f"{name}.parquet")[0] for name in ("train", "held_out")}
    (folder / "notes.json").write_text(json.dumps(notes | counts))
    return (*said, f"left out: {refusal(prompts, refused, source)}")


def measure(folder: Path, encoder: Any | None) -> Prompts:
    """The numbers. Raises DataError that names prompts which do not fit the model."""
    notes = read_json(folder / "notes.json")
    lengths: list[int] = []
    if encoder is not None:
        for name in ("train", "held_out"):
            path = folder / f"{name}.parquet"
            table = read_table(path, asked_columns(path))
            lengths += lengths_of(prompts_from(table), encoder)
    return Prompts(
        train=notes["train"],
        held_out=notes["held_out"],
        repeated=notes["repeated"],
        overlap=notes["overlap"],
        shortest=min(lengths, default=None),
        longest=max(lengths, default=None),
    )


def lengths_of(prompts: list[Prompt], encoder: Any) -> list[int]:
    """Tokens of each prompt, as it is put when drawing. Raises DataError that counts what does not fit."""
    try:
        return [len(ids) for ids in encoder.encode(prompts, for_drawing=True)] if prompts else []
    except DataError as first:
        refused = [prompt for prompt in prompts if not fits(prompt, encoder)]
        ids = ", ".join(prompt.id for prompt in refused[:NAMED])
        more = f" and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise DataError(f"{len(refused)} of {len(prompts)} prompts cannot be used ({ids}{more}). {first}") from first


def fits(prompt: Prompt, encoder: Any) -> bool:
    try:
        encoder.encode([prompt], for_drawing=True)
    except DataError:
        return False
    return True
