"""Stage `gather`: the exact training rows, each with its origin."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray
from raftune.config.training import CustomTraining, ReferenceConfig, TrainingConfig
from raftune.data.tables import read_rows
from raftune.errors import DataError
from raftune.protocols import Policy, PolicyProvider, StageInputs
from raftune.records import INVALID, TOOLS, Prompt, derive_seed, table_of
from raftune.stages.data import prepare
from raftune.stages.select import read_verdicts
from raftune.store.files import dump_json
from raftune.store.layout import chunk_file
from raftune.store.parquet import read_group, read_groups, read_table, table_writer
from raftune.training.objectives import chosen_rows, load_objective, objective_code

VERDICT = ("score", "rank", "reason")  # of a verdict, what a custom objective is given
_NOT_PAYLOAD = ("sample_id", "prompt_id", "k", "source", "seed", "version", "weight")


class GatherStage:
    """rows.parquet: what this round kept, what earlier rounds kept (replay), and reference answers."""

    name = "gather"
    writes = "rows"

    def __init__(
        self,
        policies: PolicyProvider,
        config: TrainingConfig,
        *,
        seed: int,
        round_: int,
        shards: tuple[str, ...] = ("generate",),
    ) -> None:
        self.policies, self.config, self.seed, self.round, self.shards = policies, config, seed, round_, shards
        self.replayed = tuple(f"rows@-{back}" for back in range(1, min(config.replay_rounds + 1, round_)))
        needs_encoder = ("model@-1",) if config.reference else ()
        self.reads = ("plan", *shards, "select", *self.replayed, *needs_encoder)
        self.whole = shards  # of what these hold, every column is needed
        own = ("training.objective", "training.options") if isinstance(config, CustomTraining) else ()
        self.fields = ("training.replay_rounds", "training.reference", *own, *(("seed",) if config.reference else ()))

    def fingerprints(self) -> Mapping[str, str]:
        return objective_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> None:
        tables = self.tables(inputs)
        first = next(tables)
        schema = first.schema.with_metadata({"raftune.round": str(self.round)})
        origins: Counter[str] = Counter()
        with table_writer(out / "rows.parquet", schema) as writer:
            for table in itertools.chain([first], tables):
                origins.update(table.column("origin").to_pylist())
                if table.num_rows:
                    writer.write_table(table.cast(schema))
            if self.config.reference:
                reference = self.reference(self.config.reference, inputs, sum(origins.values()), first.schema)
                origins.update(reference.column("origin").to_pylist())
                writer.write_table(reference.cast(schema))
        dump_json(out / "summary.json", origins)

    def tables(self, inputs: StageInputs) -> Iterator[pa.Table]:
        """This round's kept rows chunk by chunk, then those that earlier rounds had kept themselves."""
        objective, name = load_objective(self.config), getattr(self.config, "objective", "sft")
        columns = ["sample_id", "weight", *(VERDICT if isinstance(self.config, CustomTraining) else ())]
        for chunk, verdicts in read_verdicts(inputs["select"] / "verdicts.parquet", columns):
            samples = pa.concat_tables([read_table(inputs[name] / chunk_file(chunk)) for name in self.shards])
            assert samples.column("sample_id").equals(verdicts.column("sample_id")), "verdicts lie beside their samples"
            rows = chosen_rows(objective, name, samples, verdicts)
            yield with_prompts(rows, read_group(inputs["plan"] / "prompts.parquet", chunk), self.round)
        for offset, name in enumerate(self.replayed, 1):
            origin = f"round-{self.round - offset:04d}"
            for rows in read_groups(inputs[name] / "rows.parquet"):
                yield rows.filter(pc.equal(rows.column("origin"), origin))

    def reference(self, config: ReferenceConfig, inputs: StageInputs, others: int, schema: pa.Schema) -> pa.Table:
        """So many reference answers, chosen by seed, that they make up the configured share of all rows."""
        rows = reference_rows(config)
        answers, prompts = rows.column(config.completion_column), prompts_of(rows, config)
        wanted = min(round(others * config.fraction / (1 - config.fraction)), rows.num_rows)
        generator = np.random.Generator(np.random.Philox(derive_seed("reference", self.seed, self.round)))
        chosen = sorted(int(i) for i in generator.permutation(rows.num_rows)[:wanted])
        policy = self.policies.encoder(inputs["model@-1"])
        encoded = []
        for number in chosen:
            row = {name: prompts.column(name)[number].as_py() for name in prompts.column_names}
            prompt = Prompt(row.pop("prompt_id"), row.pop("prompt"), row)
            encoded.append(
                {
                    "sample_id": f"reference/{prompt.id}",
                    "prompt_id": prompt.id,
                    "prompt": prompt.content,
                    TOOLS: prompt.columns.get(TOOLS),
                    "weight": 1.0,
                    "origin": "reference",
                    "source": "reference",
                    **adopted(policy, prompt, answers[number].as_py(), number + 1),
                }
            )
        return table_of(encoded, schema)


def adopted(policy: Policy, prompt: Prompt, answer: Any, row: int) -> Mapping[str, Any]:
    """The payload of a reference answer. Raises DataError that names its row where it is nothing to learn from."""
    try:
        payload = policy.encode_completion(prompt, answer, "reference")
    except DataError as error:
        raise DataError(f"training.reference.path, row {row}: {error}") from error
    if payload.get(INVALID) is not None:
        raise DataError(
            f"training.reference.path, row {row}: there is nothing to learn from ({payload[INVALID]}). Remove the row."
        )
    return payload


def reference_rows(config: ReferenceConfig) -> pa.Table:
    """The data set of reference answers. Raises DataError where it cannot be read, or lacks a column that is named."""
    rows = read_rows(config.path, field="training.reference.path")
    for name in ("prompt_column", "completion_column"):
        if (column := getattr(config, name)) not in rows.column_names:
            raise DataError(
                f"training.reference.path must have the column {column!r} (training.reference.{name}); got "
                f"{', '.join(rows.column_names)}. Name one of these."
            )
    return rows


def prompts_of(rows: pa.Table, config: ReferenceConfig) -> pa.Table:
    """What the reference answers answer, with ids. Raises DataError that names the row of a prompt that is none."""
    names = [name for name in rows.column_names if name in (config.prompt_column, TOOLS)]
    return prepare(rows.select(names), config.prompt_column, "training.reference.path")


def kept_rows(samples: pa.Table, weight: FloatArray, prompts: pa.Table, round_: int) -> pa.Table:
    """The samples of positive weight as rows to train on, each beside its prompt."""
    kept = samples.filter(pa.array(weight > 0))
    return with_prompts(kept.append_column("weight", pa.array(weight[weight > 0], pa.float64())), prompts, round_)


def with_prompts(rows: pa.Table, prompts: pa.Table, round_: int) -> pa.Table:
    """The rows that reach training, each beside its prompt."""
    number = {name: i for i, name in enumerate(prompts.column("prompt_id").to_pylist())}
    at = pa.array([number[name] for name in rows.column("prompt_id").to_pylist()], pa.int64())
    columns = {
        "sample_id": rows.column("sample_id"),
        "prompt_id": rows.column("prompt_id"),
        "prompt": prompts.column("prompt").take(at),
        **({TOOLS: prompts.column(TOOLS).take(at)} if TOOLS in prompts.column_names else {}),
        "weight": rows.column("weight").cast(pa.float64()),
        "origin": pa.array([f"round-{round_:04d}"] * rows.num_rows, pa.string()),
        "source": rows.column("source"),
    }
    return pa.table(columns | {name: rows.column(name) for name in rows.column_names if name not in _NOT_PAYLOAD})
