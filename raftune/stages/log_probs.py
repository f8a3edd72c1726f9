"""Stage `logp`: log-probabilities of samples under a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from raftune.protocols import ChunkedStage, PolicyProvider, StageInputs, SupportsLogProbs
from raftune.stages.plan import asked, read_plan
from raftune.stages.score import read_shards
from raftune.store.layout import chunk_numbers
from raftune.store.parquet import write_table


class LogProbsStage(ChunkedStage):
    """One file per chunk: `log_prob`, nats of the whole completion, untempered. One model a stage: never two in memory.

    What the model recorded of its own samples while generating is not computed again.
    """

    fields = ("engine.threads",)

    def __init__(
        self, policies: PolicyProvider, *, model: str, writes: str, plan: str = "plan", shards: tuple[str, ...]
    ) -> None:
        self.policies, self.model, self.plan, self.shards = policies, model, plan, shards
        self.name, self.writes = writes.replace("evaluate/", "evaluation "), writes
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
        left = np.flatnonzero(np.isnan(values))
        if len(left):
            prompts = asked(inputs[self.plan], index, samples)
            size = int(metadata.get("batch_size", read_plan(inputs[self.plan])["batch_size"]))
            values[left] = policy.log_probs([prompts[i] for i in left], samples.take(pa.array(left)), size)
        table = samples.select(["sample_id"]).append_column("log_prob", pa.array(values, pa.float64()))
        write_table(table, out, metadata)
        return ()
