"""Stages `logp` and `evaluation reference`: log-probabilities of samples, and of reference completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.errors import DataError
from raftune.protocols import ChunkedStage, PolicyProvider, StageInputs, SupportsLogProbs
from raftune.stages.plan import prompts_of_samples, read_plan, read_prompts
from raftune.stages.score import read_shards
from raftune.store.commit import stage_of
from raftune.store.layout import chunk_numbers
from raftune.store.parquet import write_table

_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("reference_log_prob", pa.float64()),
        pa.field("tokens", pa.int64()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


class LogProbsStage(ChunkedStage):
    """One file per chunk: `log_prob`, nats of the whole completion, untempered. One model a stage: never two in memory.

    What the model recorded of its own samples while generating is not computed again.
    """

    fields = ("engine.threads",)

    def __init__(
        self, policies: PolicyProvider, *, model: str, writes: str, plan: str = "plan", shards: tuple[str, ...]
    ) -> None:
        self.policies, self.model, self.plan, self.shards = policies, model, plan, shards
        self.name, self.writes = stage_of(writes), writes
        self.reads = (plan, *shards, model)

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(*(inputs[name] for name in self.shards))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        policy = self.policies.at(inputs[self.model])
        assert isinstance(policy, SupportsLogProbs)  # the table of stages has made sure of it
        samples = read_shards([inputs[name] for name in self.shards], index)
        version = inputs[self.model].parent.name
        generated = np.array([name == version for name in samples.column("version").to_pylist()])
        values = np.where(generated, policy.recorded_log_probs(samples), np.nan)
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            prompts = prompts_of_samples(inputs[self.plan], index, samples)
            size = int(metadata.get("batch_size", read_plan(inputs[self.plan])["batch_size"]))
            values[missing] = policy.log_probs([prompts[i] for i in missing], samples.take(pa.array(missing)), size)
        table = samples.select(["sample_id"]).append_column("log_prob", pa.array(values, pa.float64()))
        write_table(table, out, metadata)
        return ()


class ReferenceStage(ChunkedStage):
    """One file per chunk, one row per prompt: `reference_log_prob` (nats) and `tokens` of its reference completion.

    The completion is encoded as if the policy had generated it. Where it is empty or the model cannot encode it, both
    are null and `detail` says why.
    """

    name = "evaluation reference"
    writes = "evaluate/reference"
    reads = ("evaluate/plan", "model")
    fields = (
        "evaluation.reference_column",
        "sampling.system_prompt",
        "sampling.few_shot_prefix",
        "sampling.chat_template_kwargs",
        "engine.threads",
    )

    def __init__(self, policies: PolicyProvider, column: str) -> None:
        self.policies, self.column = policies, column

    def chunks(self, inputs: StageInputs) -> list[int]:
        return list(range(read_plan(inputs["evaluate/plan"])["num_units"]))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        policy = self.policies.at(inputs["model"])
        assert isinstance(policy, SupportsLogProbs)  # the table of stages has made sure of it
        rows, prompts, payloads = [], [], []
        reasons: list[str] = []
        for prompt in read_prompts(inputs["evaluate/plan"], index):
            if self.column not in prompt.columns:
                raise _no_such_column(self.column, list(prompt.columns))
            row: dict[str, Any] = {"prompt_id": prompt.id, "detail": "the answer is empty"}
            if not _is_empty(completion := prompt.columns[self.column]):
                try:
                    payloads.append(policy.encode_completion(prompt, completion, f"column:{self.column}"))
                    prompts.append(prompt)
                    row["detail"] = ""
                except DataError as error:
                    row["detail"] = str(error)
            rows.append(row)
            reasons += filter(None, [row["detail"]])
        completions = pa.Table.from_pylist(payloads, schema=policy.payload)
        size = int(metadata.get("batch_size", read_plan(inputs["evaluate/plan"])["batch_size"]))
        values = policy.log_probs(prompts, completions, size) if prompts else np.empty(0)
        tokens = [1] * completions.num_rows  # of a family without tokens
        if "completion_ids" in completions.column_names:
            tokens = pc.list_value_length(completions.column("completion_ids")).to_pylist()
        usable = (row for row in rows if not row["detail"])
        for row, value, count in zip(usable, values.tolist(), tokens, strict=True):
            row |= {"reference_log_prob": value, "tokens": count}
        write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), out, metadata)
        if not reasons:
            return ()
        return (
            f"{len(reasons)} of {len(rows)} held-out prompts of chunk {index} have no usable completion in "
            f"{self.column!r}, and are left out of the perplexity: {reasons[0].rstrip('.')}",
        )


def check_references(held_out: pa.Table, column: str) -> None:
    """Raises DataError where the held-out prompts have no such column, or nothing in it."""
    if column not in held_out.column_names:
        raise _no_such_column(column, [name for name in held_out.column_names if name not in ("prompt_id", "prompt")])
    completions = held_out.column(column).to_pylist()
    if completions and all(map(_is_empty, completions)):
        raise DataError(
            f"evaluation.reference_column must hold completions; the {len(completions)} held-out prompts have none in "
            f"{column!r}. Name another column, or leave it out."
        )


def _no_such_column(column: str, columns: Sequence[str]) -> DataError:
    return DataError(
        f"evaluation.reference_column must name a column of the held-out prompts; got {column!r}, and they have "
        f"{', '.join(columns) or 'no other columns'}. Name one of these, or leave it out."
    )


def _is_empty(completion: Any) -> bool:
    """Whether it is nothing, a blank text, no message, or one message of blank content."""
    if isinstance(completion, list):
        first = completion[0] if len(completion) == 1 else None
        return not completion or (isinstance(first, dict) and _is_empty(first.get("content")))
    return completion is None or (isinstance(completion, str) and not completion.strip())
