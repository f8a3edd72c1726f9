"""Stage `plan`: prompts, samples for each, seeds, chunks and batches of a round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.protocols import EVALUATION, Chunk, StageInputs
from raftune.records import TOOLS, Prompt, derive_seed
from raftune.store.committed import read_json
from raftune.store.files import dump_json
from raftune.store.parquet import column_names, read_group, read_groups, read_metadata, read_table, write_table

READS_LEFT_OUT = ("data@0", "prompts@0")


class PlanStage:
    """plan.json and prompts.parquet, one row group a chunk; with `drop`, without what the stage `prompts` left out."""

    name = writes = "plan"
    fields = ("seed", "prompts_per_round", "sampling.num_generations", "sampling.chunk_size", "sampling.batch_size")

    def __init__(self, config: RunConfig, round_: int, drop: bool = False) -> None:
        self.config, self.round = config, round_
        self.reads = READS_LEFT_OUT if drop else ("data@0",)

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: StageInputs, out: Path) -> None:
        config = self.config
        train = inputs["data@0"] / "train.parquet"
        usable = usable_rows(train, inputs)
        numbers = prompts_of_round(len(usable), config.prompts_per_round, self.round, config.seed)
        rows = [usable[number] for number in numbers]
        write_plan(
            out,
            take(train, rows),
            scope=f"{self.round:04d}",
            version=f"round-{self.round - 1:04d}",
            seed=["run", config.seed, self.round],
            num_generations=config.sampling.num_generations,
            config=config,
        )


class EvaluationPlanStage:
    """The held-out prompts with their seeds, which depend on neither run nor round, so that all can be paired."""

    name = "evaluation plan"
    writes = "evaluate/plan"
    fields = ("evaluation.num_generations", "evaluation.seed", "sampling.chunk_size", "sampling.batch_size")

    def __init__(self, config: RunConfig, round_: int, drop: bool = False) -> None:
        self.config, self.round = config, round_
        self.reads = READS_LEFT_OUT if drop else ("data@0",)

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: StageInputs, out: Path) -> None:
        evaluation = self.config.evaluation
        write_plan(
            out,
            without_left_out(read_table(inputs["data@0"] / "held_out.parquet"), inputs),
            scope=f"{self.round:04d}{EVALUATION}",
            version=f"round-{self.round:04d}",
            seed=["evaluation", evaluation.seed],
            num_generations=evaluation.num_generations,
            config=self.config,
        )


def left_out(inputs: StageInputs) -> frozenset[str]:
    """The ids of the prompts that the model cannot take and the run goes without."""
    path = inputs["prompts@0"] / "left_out.json" if "prompts@0" in inputs else None
    return frozenset(json.loads(path.read_text()) if path is not None and path.is_file() else ())


def usable_rows(path: Path, inputs: StageInputs) -> Sequence[int]:
    """The numbers of the file's rows that are not left out."""
    if not (gone := left_out(inputs)):
        return range(read_metadata(path)[0])
    ids = read_table(path, ["prompt_id"]).column("prompt_id").to_pylist()
    return [number for number, name in enumerate(ids) if name not in gone]


def without_left_out(prompts: pa.Table, inputs: StageInputs) -> pa.Table:
    if not (gone := left_out(inputs)):
        return prompts
    return prompts.filter(pa.array([name not in gone for name in prompts.column("prompt_id").to_pylist()], pa.bool_()))


def write_plan(
    out: Path, prompts: pa.Table, *, scope: str, version: str, seed: list[Any], num_generations: int, config: RunConfig
) -> None:
    size = config.sampling.chunk_size
    write_table(prompts, out / "prompts.parquet", rows_per_group=size)
    plan = {
        "scope": scope,
        "version": version,
        "seed": seed,
        "num_generations": num_generations,
        "num_prompts": prompts.num_rows,
        "num_units": -(-prompts.num_rows // size),
        "chunk_size": size,
        "batch_size": config.sampling.batch_size,
    }
    dump_json(out / "plan.json", plan)


def read_plan(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = read_json(folder / "plan.json")
    return loaded


def read_chunk(folder: Path, index: int) -> Chunk:
    """The chunk as planned: its prompts, and for each the seeds of its K samples."""
    plan = read_plan(folder)
    prompts = tuple(read_prompts(folder, index))
    seeds = tuple(
        tuple(derive_seed(*plan["seed"], prompt.id, k) for k in range(plan["num_generations"])) for prompt in prompts
    )
    return Chunk(index, plan["scope"], plan["version"], prompts, seeds, plan["batch_size"])


def read_prompts(folder: Path, index: int) -> list[Prompt]:
    """The prompts of a chunk, with the columns that ride along."""
    return prompts_from(read_group(folder / "prompts.parquet", index))


def asked_columns(path: Path) -> list[str]:
    """The columns of a file of prompts that a policy is asked with."""
    return [name for name in ("prompt_id", "prompt", TOOLS) if name in column_names(path)]


def prompts_from(rows: pa.Table) -> list[Prompt]:
    """The prompts of a table with `prompt_id`, `prompt` and columns that ride along."""
    return [Prompt(row.pop("prompt_id"), row.pop("prompt"), row) for row in rows.to_pylist()]


def asked(folder: Path, index: int, samples: pa.Table) -> list[Prompt]:
    """For each sample of the chunk the prompt that it answers."""
    prompts = {prompt.id: prompt for prompt in read_prompts(folder, index)}
    return [prompts[name] for name in samples.column("prompt_id").to_pylist()]


def take(path: Path, rows: list[int]) -> pa.Table:
    """These rows of a file in this order, read group by group: memory goes by the rows that are taken."""
    wanted = np.array(rows, dtype=np.int64)
    order = np.argsort(wanted, kind="stable")
    parts, at = [], 0
    for group in read_groups(path):
        inside = wanted[order[(wanted[order] >= at) & (wanted[order] < at + group.num_rows)]]
        parts.append(group.take(pa.array(inside - at)))
        at += group.num_rows
    return pa.concat_tables(parts).take(pa.array(np.argsort(order, kind="stable")))


def prompts_of_round(total: int, per_round: int, round_: int, seed: int) -> list[int]:
    """The rows that a round asks: without replacement within an epoch, and never one row twice in a round.

    A round that crosses the end of an epoch takes from the next one only rows that it does not hold yet; those it
    passes over stay at the front of that epoch for the next round. Where a round wants more rows than there are, it
    takes each once.
    """
    per_round = min(per_round, total)
    epoch, waiting = 0, order_of_epoch(total, 0, seed)
    taken: list[int] = []
    for _ in range(round_):
        taken, waiting = waiting[:per_round], waiting[per_round:]
        if len(taken) < per_round:
            epoch += 1
            held = set(taken)
            following = order_of_epoch(total, epoch, seed)
            new = [row for row in following if row not in held][: per_round - len(taken)]
            taken = taken + new
            chosen = set(new)
            waiting = [row for row in following if row not in chosen]
    return taken


def order_of_epoch(total: int, epoch: int, seed: int) -> list[int]:
    """A permutation of all rows that depends on seed and epoch alone."""
    key = derive_seed("prompt order", seed, epoch)
    return [int(row) for row in np.random.Generator(np.random.Philox(key)).permutation(total)]
