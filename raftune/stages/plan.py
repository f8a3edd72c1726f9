"""Stage `plan`: prompts, samples for each, seeds, chunks and batches of a round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.config.run import RunConfig
from raftune.protocols import EVALUATION, Chunk, SingleStage, StageInputs
from raftune.records import TOOLS, Prompt, derive_seed
from raftune.store.committed import read_json
from raftune.store.files import dump_json
from raftune.store.parquet import column_names, read_group, read_groups, read_metadata, read_table, write_table


class PlanStage(SingleStage):
    """plan.json and prompts.parquet, one row group a chunk; with `drop`, without what the stage `prompts` left out."""

    name = writes = "plan"
    fields: tuple[str, ...] = (
        *("seed", "prompts_per_round", "sampling.num_generations"),
        *("sampling.chunk_size", "sampling.batch_size"),
    )

    def __init__(self, config: RunConfig, round_: int, drop: bool = False) -> None:
        self.config, self.round = config, round_
        self.reads = ("data@0", "prompts@0") if drop else ("data@0",)

    def run(self, inputs: StageInputs, out: Path) -> None:
        config, train, dropped = self.config, inputs["data@0"] / "train.parquet", left_out(inputs)
        usable: Any = range(read_metadata(train)[0])
        if dropped:
            ids = read_table(train, ["prompt_id"]).column("prompt_id").to_pylist()
            usable = [row for row, name in enumerate(ids) if name not in dropped]
        numbers = prompts_of_round(len(usable), config.prompts_per_round, self.round, config.seed)
        self._write(
            out,
            take(train, [usable[number] for number in numbers]),
            scope=f"{self.round:04d}",
            version=f"round-{self.round - 1:04d}",
            seed=["run", config.seed, self.round],
            num_generations=config.sampling.num_generations,
        )

    def _write(self, out: Path, prompts: pa.Table, **plan: Any) -> None:
        size = self.config.sampling.chunk_size
        write_table(prompts, out / "prompts.parquet", rows_per_group=size)
        plan |= {
            "num_prompts": prompts.num_rows,
            "num_units": -(-prompts.num_rows // size),
            "chunk_size": size,
            "batch_size": self.config.sampling.batch_size,
        }
        dump_json(out / "plan.json", plan)


class EvaluationPlanStage(PlanStage):
    """The held-out prompts with their seeds, which depend on neither run nor round, so that rounds can be paired."""

    name = "evaluation plan"
    writes = "evaluate/plan"
    fields = ("evaluation.num_generations", "evaluation.seed", "sampling.chunk_size", "sampling.batch_size")

    def run(self, inputs: StageInputs, out: Path) -> None:
        prompts, dropped = read_table(inputs["data@0"] / "held_out.parquet"), left_out(inputs)
        if dropped:
            ids = prompts.column("prompt_id").to_pylist()
            prompts = prompts.filter(pa.array([name not in dropped for name in ids], pa.bool_()))
        self._write(
            out,
            prompts,
            scope=f"{self.round:04d}{EVALUATION}",
            version=f"round-{self.round:04d}",
            seed=["evaluation", self.config.evaluation.seed],
            num_generations=self.config.evaluation.num_generations,
        )


def left_out(inputs: StageInputs) -> frozenset[str]:
    """The ids of the unusable prompts that the run leaves out."""
    path = inputs["prompts@0"] / "left_out.json" if "prompts@0" in inputs else None
    return frozenset(json.loads(path.read_text()) if path is not None and path.is_file() else ())


def read_plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = read_json(folder / "plan.json")
    return plan


def read_chunk(folder: Path, index: int) -> Chunk:
    """The chunk as planned: its prompts, and for each the seeds of its K samples."""
    plan = read_plan(folder)
    prompts = tuple(read_prompts(folder, index))
    seeds = tuple(
        tuple(derive_seed(*plan["seed"], prompt.id, k) for k in range(plan["num_generations"])) for prompt in prompts
    )
    return Chunk(index, plan["scope"], plan["version"], prompts, seeds, plan["batch_size"])


def read_prompts(folder: Path, index: int) -> list[Prompt]:
    """The prompts of a chunk, with all their columns."""
    return prompts_from(read_group(folder / "prompts.parquet", index))


def prompt_columns(path: Path) -> list[str]:
    """The columns of a file of prompts that a policy needs."""
    return [name for name in ("prompt_id", "prompt", TOOLS) if name in column_names(path)]


def prompts_from(rows: pa.Table) -> list[Prompt]:
    """The prompts of a table with `prompt_id`, `prompt` and further columns."""
    return [Prompt(row.pop("prompt_id"), row.pop("prompt"), row) for row in rows.to_pylist()]


def prompts_of_samples(folder: Path, index: int, samples: pa.Table) -> list[Prompt]:
    """The prompt of each sample of the chunk."""
    prompts = {prompt.id: prompt for prompt in read_prompts(folder, index)}
    return [prompts[name] for name in samples.column("prompt_id").to_pylist()]


def take(path: Path, rows: list[int]) -> pa.Table:
    """These rows of a file in this order, read group by group: memory is that of the rows taken."""
    numbers = np.array(rows, dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    parts, at = [], 0
    for group in read_groups(path):
        inside = numbers[order[(numbers[order] >= at) & (numbers[order] < at + group.num_rows)]]
        parts.append(group.take(pa.array(inside - at)))
        at += group.num_rows
    return pa.concat_tables(parts).take(pa.array(np.argsort(order, kind="stable")))


def prompts_of_round(total: int, per_round: int, round_: int, seed: int) -> list[int]:
    """The rows of a round: without replacement within an epoch, and never one row twice in a round.

    Each epoch is a permutation of all rows that depends on seed and epoch alone. A round that crosses the end of an
    epoch takes only rows of the next that it does not hold yet; those it skips stay at the front of that epoch. A round
    that wants more rows than there are takes each once.
    """
    per_round = min(per_round, total)
    taken: list[int] = []
    waiting: list[int] = []
    epoch = 0
    for number in range(round_):
        taken, waiting = waiting[:per_round], waiting[per_round:]
        if len(taken) < per_round or not number:
            generator = np.random.Generator(np.random.Philox(derive_seed("prompt order", seed, epoch)))
            following = generator.permutation(total).tolist()
            epoch += 1
            held = set(taken)
            new = [row for row in following if row not in held][: per_round - len(taken)]
            taken = taken + new
            chosen = set(new)
            waiting = [row for row in following if row not in chosen]
    return taken
