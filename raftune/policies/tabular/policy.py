"""The tabular policy: one categorical distribution for each prompt.

Its best-of-K distribution is known exactly, so tests can compare the loop with theory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raftune.arrays import FloatArray
from raftune.config.policy import TabularPolicy
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, DataError, ModelError
from raftune.policies.unsupported import all_but, refuse_unused
from raftune.protocols import Chunk, TrainReport
from raftune.records import Prompt, Sample

FILE = "policy.json"


class Tabular:
    """p[x, y]: rows are prompt labels, columns are completions. Training moves p to (1 - step)·p + step·q."""

    media = "category"
    payload = pa.schema([pa.field("completion", pa.int64(), nullable=False)])

    def __init__(self, log_p: FloatArray, config: RunConfig) -> None:
        self.log_p, self.config = log_p, config

    @classmethod
    def start(cls, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> None:
        """Writes the initial model. Raises ConfigError for fields that this family would ignore, and bad logits."""
        assert isinstance(config.policy, TabularPolicy)
        check_unused(config)
        logits = config.policy.logits or [[0.0] * config.policy.num_answers] * config.policy.num_prompts
        if len({len(row) for row in logits}) != 1:
            lengths = sorted({len(row) for row in logits})
            raise ConfigError(
                f"policy.logits must have rows of one length; got lengths {lengths}. Give each prompt the same "
                "completions."
            )
        table = np.array([[-np.inf if v is None else v for v in row] for row in logits], dtype=np.float64)
        if (table == -np.inf).all(axis=1).any():
            raise ConfigError(
                "policy.logits must leave each prompt a completion that is not null; got a row of nulls. Give one a "
                "number."
            )
        shifted = table - table.max(axis=1, keepdims=True)
        save(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), out)

    @classmethod
    def section_at(cls, policy: Mapping[str, Any], folder: Path, start: Path) -> dict[str, Any]:
        """The `policy` section of a run that starts from this committed folder."""
        return {**policy, "logits": json.loads((folder / FILE).read_text())["log_p"]}

    @classmethod
    def verify(cls, start: Path) -> None:
        """Nothing to check: the start lies in the run itself, under its manifest."""

    @classmethod
    def load(cls, config: RunConfig, folder: Path, start: Path) -> Tabular:
        values = json.loads((folder / FILE).read_text())["log_p"]
        log_p = np.array([[-np.inf if v is None else v for v in row] for row in values], dtype=np.float64)
        if np.isnan(log_p).any():
            raise ModelError(f"{folder / FILE} must hold log-probabilities; got NaN. Restore the file.")
        return cls(log_p, config)

    @property
    def nbytes(self) -> int:
        return self.log_p.nbytes

    def generate(self, chunk: Chunk) -> list[Sample]:
        """K samples of a prompt by inverse CDF, one uniform a sample, which its seed alone determines."""
        temperature = self.config.sampling.temperature
        samples = []
        for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True):
            row = self.log_p[self.label(prompt)]
            with np.errstate(invalid="ignore"):
                weights = (
                    np.exp(row - row.max()) ** (1 / temperature) if temperature else (row == row.max()).astype(float)
                )
            cdf = np.cumsum(weights)
            for k, seed in enumerate(seeds):
                answer = int(np.searchsorted(cdf, uniform(seed) * cdf[-1], side="right"))
                samples.append(Sample(chunk.sample_id(prompt, k), prompt.id, k, "policy", seed, chunk.version, answer))
        return samples

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        if not isinstance(answer, int) or not 0 <= answer < self.log_p.shape[1]:
            raise DataError(
                f"a completion of prompt {prompt.id} must be an index in 0 … {self.log_p.shape[1] - 1}; "
                f"got {answer!r} ({source})."
            )
        return {"completion": answer}

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        """The maximum-likelihood fit in closed form; a prompt without rows keeps its distribution."""
        assert isinstance(self.config.policy, TabularPolicy)
        step = self.config.policy.step
        table = pq.read_table(rows, columns=["prompt", "completion", "weight"], use_threads=False)
        mass = np.zeros_like(self.log_p)
        labels = table.column("prompt").to_numpy()
        np.add.at(mass, (labels, table.column("completion").to_numpy()), table.column("weight").to_numpy())
        total = mass.sum(axis=1, keepdims=True)
        p = np.exp(self.log_p)
        q = np.divide(mass, total, out=p.copy(), where=total > 0)
        fitted = (1 - step) * p + step * q
        with np.errstate(divide="ignore"):
            save(np.log(fitted / fitted.sum(axis=1, keepdims=True)), out)
            loss = -float(np.sum(np.where(mass > 0, mass, 0) * np.where(mass > 0, np.log(p), 0)) / mass.sum())
        return TrainReport(rows=table.num_rows, steps=1, losses=(loss,))

    def log_probs(self, prompts: Sequence[Prompt], samples: pa.Table, batch_size: int) -> FloatArray:
        labels = np.array([self.label(prompt) for prompt in prompts], dtype=np.int64)
        return np.asarray(self.log_p[labels, samples.column("completion").to_numpy()], dtype=np.float64)

    def recorded_log_probs(self, samples: pa.Table) -> FloatArray:
        """Not recorded while generating: looking them up is as cheap."""
        return np.full(samples.num_rows, np.nan)

    def check_config(self) -> None:
        check_unused(self.config)

    def notes(self) -> tuple[str, ...]:
        return ()

    def label(self, prompt: Prompt) -> int:
        """The prompt's row. Raises DataError unless the prompt is a label of this table."""
        if not isinstance(prompt.content, int) or not 0 <= prompt.content < len(self.log_p):
            raise DataError(
                f"a prompt of the tabular family must be a label in 0 … {len(self.log_p) - 1}; got {prompt.content!r}."
            )
        return prompt.content


def check_unused(config: RunConfig) -> None:
    """Raises ConfigError for an option of generating or training that a table of probabilities does not have."""
    read = ("num_generations", "temperature", "batch_size", "chunk_size", "candidate_columns")
    unread = [
        *all_but(config.sampling, "sampling", read),
        *all_but(config.training, "training", ("start_from", "replay_rounds", "reference")),
        "keep_latents",
    ]
    refuse_unused(config, "tabular", unread)


def save(log_p: FloatArray, out: Path) -> None:
    """Writes the table as JSON; zero probability (log -inf) is null."""
    values = [[float(v) if np.isfinite(v) else None for v in row] for row in log_p]
    (out / FILE).write_text(json.dumps({"log_p": values}) + "\n")


def uniform(seed: int) -> float:
    """One uniform in [0, 1) with 53 random bits, from the counter-based Philox keyed by the seed."""
    return float(np.random.Generator(np.random.Philox(key=seed)).random())
