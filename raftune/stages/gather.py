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

from raftune.config.training import CustomTraining, ReferenceConfig, TrainingConfig
from raftune.data.tables import read_rows
from raftune.errors import DataError
from raftune.protocols import Policy, PolicyProvider, SingleStage, StageInputs
from raftune.records import INVALID, TOOLS, Prompt, derive_seed, table_of
from raftune.stages.data import prepare
from raftune.stages.score import read_shards
from raftune.stages.select import read_verdicts
from raftune.store.files import dump_json
from raftune.store.parquet import read_group, read_groups, table_writer
from raftune.training.objectives import chosen_rows, load_objective, objective_code


class GatherStage(SingleStage):
    """rows.parquet: what this round kept, what earlier rounds kept (replay), and reference completions."""

    name = "gather"
    writes = "rows"

    def __init__(
        self, policies: PolicyProvider, config: TrainingConfig, *, seed: int, round_: int, shards: tuple[str, ...]
    ) -> None:
        self.policies, self.config, self.seed, self.round, self.shards = policies, config, seed, round_, shards
        self.custom = isinstance(config, CustomTraining)
        self.replayed = tuple(f"rows@-{back}" for back in range(1, min(config.replay_rounds + 1, round_)))
        self.reads = ("plan", *shards, "select", *self.replayed, *(("model@-1",) if config.reference else ()))
        self.whole = shards
        options = ("training.objective", "training.options") if self.custom else ()
        seeded = ("seed",) if config.reference else ()
        self.fields = ("training.replay_rounds", "training.reference", *options, *seeded)

    def fingerprints(self) -> Mapping[str, str]:
        return objective_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> None:
        tables = self._tables(inputs)
        first = next(tables)
        schema = first.schema.with_metadata({"raftune.round": str(self.round)})
        origins: Counter[str] = Counter()
        with table_writer(out / "rows.parquet", schema) as writer:
            for table in itertools.chain([first], tables):
                origins.update(table.column("origin").to_pylist())
                if table.num_rows:
                    writer.write_table(table.cast(schema))
            if self.config.reference:
                reference = self._reference(self.config.reference, inputs, sum(origins.values()), first.schema)
                origins.update(reference.column("origin").to_pylist())
                writer.write_table(reference.cast(schema))
        dump_json(out / "summary.json", origins)

    def _tables(self, inputs: StageInputs) -> Iterator[pa.Table]:
        """This round's kept rows chunk by chunk, then those that earlier rounds kept of their own samples."""
        objective, name = load_objective(self.config), getattr(self.config, "objective", "sft")
        columns = ["sample_id", "weight", *(("score", "rank", "reason") if self.custom else ())]
        for chunk, verdicts in read_verdicts(inputs["select"] / "verdicts.parquet", columns):
            samples = read_shards([inputs[shard] for shard in self.shards], chunk)
            assert samples.column("sample_id").equals(verdicts.column("sample_id")), "verdicts lie beside their samples"
            rows = chosen_rows(objective, name, samples, verdicts)
            yield with_prompts(rows, read_group(inputs["plan"] / "prompts.parquet", chunk), self.round)
        for offset, replayed in enumerate(self.replayed, 1):
            origin = f"round-{self.round - offset:04d}"
            for rows in read_groups(inputs[replayed] / "rows.parquet"):
                yield rows.filter(pc.equal(rows.column("origin"), origin))

    def _reference(self, config: ReferenceConfig, inputs: StageInputs, others: int, schema: pa.Schema) -> pa.Table:
        """Reference completions, chosen by seed, as many as make up the configured share of all rows."""
        rows = reference_rows(config)
        completions, prompts = rows.column(config.completion_column), prompts_of(rows, config)
        count = min(round(others * config.fraction / (1 - config.fraction)), rows.num_rows)
        generator = np.random.Generator(np.random.Philox(derive_seed("reference", self.seed, self.round)))
        policy = self.policies.encoder(inputs["model@-1"])
        encoded = []
        for number in sorted(generator.permutation(rows.num_rows)[:count].tolist()):
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
                    **encoded_reference(policy, prompt, completions[number].as_py(), number + 1),
                }
            )
        return table_of(encoded, schema)


def encoded_reference(policy: Policy, prompt: Prompt, answer: Any, row: int) -> Mapping[str, Any]:
    """The payload of a reference completion. Raises DataError that names its row where it cannot be trained on."""
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
    """The data set of reference completions. Raises DataError where it cannot be read, or lacks a named column."""
    rows = read_rows(config.path, field="training.reference.path")
    for name in ("prompt_column", "completion_column"):
        if (column := getattr(config, name)) not in rows.column_names:
            raise DataError(
                f"training.reference.path must have the column {column!r} (training.reference.{name}); got "
                f"{', '.join(rows.column_names)}. Name one of these."
            )
    return rows


def prompts_of(rows: pa.Table, config: ReferenceConfig) -> pa.Table:
    """The prompts of the reference completions, with ids. Raises DataError that names the row of an invalid prompt."""
    names = [name for name in rows.column_names if name in (config.prompt_column, TOOLS)]
    return prepare(rows.select(names), config.prompt_column, "training.reference.path")


def with_prompts(rows: pa.Table, prompts: pa.Table, round_: int) -> pa.Table:
    """The training rows, each beside its prompt."""
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
    payload = [name for name in rows.column_names if name not in (*columns, "k", "seed", "version")]
    return pa.table(columns | {name: rows.column(name) for name in payload})
