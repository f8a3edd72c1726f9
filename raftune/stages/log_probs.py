"""Stage `logp`: log-probabilities of samples under a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from raftune.arrays import FloatArray
from raftune.protocols import PolicyProvider, StageInputs, SupportsLogProbs
from raftune.stages.plan import asked, read_plan
from raftune.stages.score import read_shards
from raftune.store.layout import chunk_numbers
from raftune.store.parquet import write_table


class LogProbsStage:
    """One file per chunk: `log_prob`, nats of the whole answer, untempered. One model a stage: never two in memory."""

    local = False
    fields = ("engine.threads",)

    def __init__(
        self,
        policies: PolicyProvider,
        *,
        model: str,
        writes: str,
        plan: str = "plan",
        shards: tuple[str, ...] = ("generate",),
    ) -> None:
        self.policies, self.model, self.plan, self.shards = policies, model, plan, shards
        self.name = writes.replace("evaluate/", "evaluation ")
        self.writes = writes
        self.reads = (plan, *shards, model)

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return chunk_numbers(*(inputs[name] for name in self.shards))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        policy = self.policies.at(inputs[self.model])
        assert isinstance(policy, SupportsLogProbs)  # planning has made sure of it
        samples = pa.concat_tables(read_shards([inputs[name] for name in self.shards], index))
        values = noted(policy, samples, by=inputs[self.model].parent.name)
        left = np.flatnonzero(np.isnan(values))
        if len(left):
            prompts = asked(inputs[self.plan], index, samples)
            planned = read_plan(inputs[self.plan])["batch_size"]
            size = int(metadata.get("batch_size", planned))
            values[left] = policy.log_probs([prompts[i] for i in left], samples.take(pa.array(left)), size)
        table = samples.select(["sample_id"]).append_column("log_prob", pa.array(values, pa.float64()))
        write_table(table, out, metadata)
        return ()


def noted(policy: SupportsLogProbs, samples: pa.Table, by: str) -> FloatArray:
    """(N,) what the model of round `by` noted of its own samples, which spares a pass over them; NaN for all others."""
    own = np.array([version == by for version in samples.column("version").to_pylist()])
    return np.where(own, policy.recorded_log_probs(samples), np.nan)
