"""The four records of the ledger, and their Arrow columns.

A prompt is asked; a sample answers it; a score values the sample; a verdict decides about it. Each lies on disk as
one row of Parquet whose columns pandas, DuckDB and `datasets` read unaided.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pyarrow as pa

PromptContent = str | int | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: a text, a list of messages or a class label; `columns` ride along to the rewards."""

    id: str
    content: PromptContent
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one prompt. `seed` is None where nothing was drawn; `payload` holds the family's own columns."""

    id: str
    prompt_id: str
    k: int
    source: str
    seed: int | None
    version: str
    completion: Any
    payload: Mapping[str, Any] = field(default_factory=dict)


class Status(StrEnum):
    """How a score, or one part of it, came about. Only OK samples can be selected."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    INVALID = "invalid"
    ERROR = "error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Part:
    """What one reward said of one sample; `value` is None unless the status is OK."""

    value: float | None
    status: Status
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum of the parts that apply; `value` is None unless the status is OK.

    `detail` says why no reward was asked, where none was.
    """

    value: float | None
    status: Status
    parts: Mapping[str, Part]
    detail: str = ""


# Columns of a payload that mean the same in every family that has them.
INVALID = "invalid"  # why the sample is nothing to learn from, null where it is: then no reward is asked about it
LATENTS = "latents"  # what only tuning reads, and `keep_latents` may drop once a round is tuned

# The columns of a draw shard before the family's own payload columns.
SAMPLE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("k", pa.int32(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("seed", pa.int64()),
    pa.field("version", pa.string(), nullable=False),
)
VERDICT_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("ranked_by", pa.float64()),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string()), nullable=False),
    ]
)


def sample_schema(payload: pa.Schema) -> pa.Schema:
    """The columns of a draw shard of a family with this payload."""
    return pa.schema([*SAMPLE_FIELDS, *payload])


def samples_table(samples: Iterable[Sample], payload: pa.Schema) -> pa.Table:
    """One row a sample, in the given order; `payload` names the family's columns, `completion` among them."""
    rows = [
        {
            "sample_id": s.id,
            "prompt_id": s.prompt_id,
            "k": s.k,
            "source": s.source,
            "seed": s.seed,
            "version": s.version,
            "completion": s.completion,
            **s.payload,
        }
        for s in samples
    ]
    return pa.Table.from_pylist(rows, schema=sample_schema(payload))


def score_schema(names: Sequence[str]) -> pa.Schema:
    """The columns of a score shard whose rewards bear these names."""
    parts = [f for n in names for f in (pa.field(f"rewards/{n}", pa.float64()), pa.field(f"status/{n}", pa.string()))]
    return pa.schema(
        [
            pa.field("sample_id", pa.string(), nullable=False),
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("k", pa.int32(), nullable=False),
            pa.field("source", pa.string(), nullable=False),
            pa.field("score", pa.float64()),
            pa.field("status", pa.string(), nullable=False),
            *parts,
            pa.field("detail", pa.string(), nullable=False),
        ]
    )


def scores_table(samples: pa.Table, scores: Sequence[Score], names: Sequence[str]) -> pa.Table:
    """One row a score, beside the identity of its sample; `samples` is the draw shard, row for row."""
    columns: dict[str, Any] = {name: samples.column(name) for name in ("sample_id", "prompt_id", "k", "source")}
    columns["score"] = [s.value for s in scores]
    columns["status"] = [s.status.value for s in scores]
    for name in names:
        columns[f"rewards/{name}"] = [s.parts[name].value for s in scores]
        columns[f"status/{name}"] = [s.parts[name].status.value for s in scores]
    columns["detail"] = [
        s.detail or "; ".join(f"{n}: {p.detail}" for n, p in s.parts.items() if p.detail) for s in scores
    ]
    return pa.table(columns, schema=score_schema(names))


def prompt_ids(contents: Iterable[PromptContent]) -> list[str]:
    """For each prompt the hash of its content and its occurrence number: equal prompts get distinct, stable ids."""
    seen: dict[str, int] = {}
    ids = []
    for content in contents:
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        occurrence = seen[digest] = seen.get(digest, -1) + 1
        ids.append(f"{digest}-{occurrence}")
    return ids


_COMPACT = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would build an encoder for each sample


def derive_seed(*parts: str | int) -> int:
    """A seed in [0, 2**63) that depends on every part and on nothing else (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(_COMPACT(parts).encode(), digest_size=8).digest(), "big") >> 1


def content_hash(completion: Any) -> int:
    """A 64-bit hash by which identical completions of a prompt are found."""
    data = completion if isinstance(completion, bytes) else str(completion).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
