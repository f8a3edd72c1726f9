"""Log-prob mismatch: the log-probabilities that a backend recorded while generating, against the trainer's own forward.

Measured before the first optimizer step on a few of the round's rows: the model that training starts from is then the
one that generated them. Temperature and truncation have no part, since recorded log-probabilities are raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raftune.policies.causal_lm.encoding import TextEncoder
from raftune.policies.causal_lm.likelihood import CompletionLogits, TokenizedCompletion, token_log_probs
from raftune.policies.causal_lm.loading import evaluating
from raftune.policies.causal_lm.weight_probe import LIMITS, LIMITS_IN_HALF, read_probe
from raftune.records import TOOLS, Prompt

# Of a sample: one of so many rows, but at least and at most so many; tokens at most, unless one row alone has more.
ONE_OF, FEWEST, MOST, TOKENS = 8, 4, 16, 4096
AT_ONCE = 4  # rows of a batch


@dataclass(frozen=True)
class RecordedRow:
    """A sample that the policy generated: its ids, and the nats of each completion token that were recorded then."""

    sample_id: str
    example: TokenizedCompletion
    log_probs: list[float]


def generated_round(folder: Path, round_: int) -> bool:
    """Whether the model in this folder of a run generated for that round: it is the model of the round before."""
    return folder.parent.name == f"round-{round_ - 1:04d}"


def recorded_rows(path: Path, encoder: TextEncoder, folder: Path) -> list[RecordedRow]:
    """Training rows, evenly spread over those that the model in this folder generated for this round; none of others.

    Prompts are encoded as they were for generating.
    """
    file = pq.ParquetFile(path)
    round_ = int((file.schema_arrow.metadata or {}).get(b"raftune.round", b"0"))
    if not generated_round(folder, round_) or "completion_logprobs" not in file.schema_arrow.names:
        return []
    marks = file.read(["origin", "source"])
    own = pc.and_(pc.equal(marks["origin"], f"round-{round_:04d}"), pc.equal(marks["source"], "policy"))
    rows = np.flatnonzero(own.to_numpy(zero_copy_only=False))
    count = min(len(rows), max(FEWEST, min(MOST, len(rows) // ONE_OF)))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)] if count else rows
    names = ["sample_id", "prompt_id", "prompt", "completion_ids", "completion_logprobs"]
    names += [name for name in (TOOLS,) if name in file.schema_arrow.names]
    found, first = [], 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        here = rows[(rows >= first) & (rows < first + count)] - first
        if len(here):
            found += file.read_row_group(group, names).take(pa.array(here)).to_pylist()
        first += count
    found = [row for row in found if row["completion_logprobs"]]
    prompts = [
        Prompt(row["prompt_id"], row["prompt"], {TOOLS: row[TOOLS]} if row.get(TOOLS) is not None else {})
        for row in found
    ]
    result: list[RecordedRow] = []
    tokens = 0
    for row, ids in zip(found, encoder.encode(prompts, for_drawing=True), strict=True):
        example = TokenizedCompletion.of(ids, row["completion_ids"])
        tokens += len(example.ids)
        if not result or tokens <= TOKENS:
            result.append(RecordedRow(row["sample_id"], example, row["completion_logprobs"]))
    return result


def mismatch(model: Any, rows: Sequence[RecordedRow], folder: Path, pad_id: int) -> dict[str, Any]:
    """Mean, 99th percentile and maximum of |Δ| in nats a token, with the mean that is allowed; empty without rows.

    Allowed is what the model's dtype and its own noise explain, as for the weight probe in its folder. `worst` are the
    samples with the largest means.
    """
    if not rows:
        return {}
    with evaluating(model):
        reader = CompletionLogits(model)
        batches = [[row.example for row in rows[i : i + AT_ONCE]] for i in range(0, len(rows), AT_ONCE)]
        computed = np.concatenate([token_log_probs(reader, batch, pad_id) for batch in batches])
    distances = np.abs(computed - np.concatenate([row.log_probs for row in rows]))
    ends = np.cumsum([row.example.tokens for row in rows])[:-1]
    means = [float(part.mean()) for part in np.split(distances, ends)]
    probe = read_probe(folder)
    floor, _ = LIMITS.get(str(model.dtype).removeprefix("torch."), LIMITS_IN_HALF)
    return {
        "completions": len(rows),
        "tokens": len(distances),
        "mean": float(distances.mean()),
        "p99": float(np.quantile(distances, 0.99)),
        "max": float(distances.max()),
        "allowed": floor if probe is None else probe.allowed,
        "worst": [[rows[i].sample_id, means[i]] for i in np.argsort(means, kind="stable")[::-1][:4].tolist()],
    }
