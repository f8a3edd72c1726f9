"""Training rows and held-out rows of demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from raftune.data.rows import Demonstration, SkippedRow
from raftune.errors import DataError, TooLong
from raftune.protocols import Policy, SupportsTruncation
from raftune.records import TOOLS, JsonType, Prompt, derive_seed, prompt_ids

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])


def prompt_id(row: Demonstration) -> str:
    """The prompt's id: equal prompts have one, with tools only where those are equal too."""
    content: Any = row.prompt if row.tools is None else [row.prompt, row.tools]
    return prompt_ids([content])[0]


def held_out_prompts(rows: Sequence[Demonstration], fraction: float) -> frozenset[str]:
    """The ids of the share of prompts that is held out: those with the lowest hashes, whatever the order of rows."""
    ids = {prompt_id(row) for row in rows}
    ordered = sorted(ids, key=lambda name: (derive_seed("hold out", name.rsplit("-", 1)[0]), name))
    return frozenset(ordered[: int(len(ordered) * fraction)])


def of_one_kind(rows: Sequence[Demonstration]) -> tuple[list[Demonstration], list[str]]:
    """The rows with prompts of one kind, which one column needs: beside messages, a text becomes a user's message."""
    texts = sum(isinstance(row.prompt, str) for row in rows)
    if texts in (0, len(rows)) or any(isinstance(row.prompt, int) for row in rows):
        return list(rows), []
    note = f"{texts:,} of {len(rows):,} prompts are texts and became a user's message, since the others are messages"
    converted = []
    for row in rows:
        if isinstance(row.prompt, str):
            answer = [{"role": "assistant", "content": row.completion}]
            row = replace(row, prompt=[{"role": "user", "content": row.prompt}], completion=answer)
        converted.append(row)
    return converted, [note]


def rows_schema(rows: Sequence[Demonstration], payload: pa.Schema) -> pa.Schema:
    """The columns of rows.parquet, as a round's training reads them."""
    plain = all(m.keys() == {"role", "content"} for row in rows if isinstance(row.prompt, list) for m in row.prompt)
    if any(isinstance(row.prompt, list) for row in rows):
        prompt = pa.list_(MESSAGE) if plain else JsonType()
    else:
        prompt = pa.int64() if any(isinstance(row.prompt, int) for row in rows) else pa.string()
    fields = [
        *(pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "prompt_id")),
        pa.field("prompt", prompt, nullable=False),
        *([pa.field(TOOLS, JsonType())] if any(row.tools is not None for row in rows) else []),
        pa.field("weight", pa.float64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("origin", "source")),
    ]
    return pa.schema([*fields, *payload], metadata={"raftune.round": "0"})


def encode_row(row: Demonstration, policy: Policy, max_length: int | None) -> dict[str, Any] | SkippedRow:
    """One row of rows.parquet, cut to what fits where the policy can do that; a skipped row where it cannot read it."""
    try:
        content, answer = (_as_text(part) if isinstance(part, list) else part for part in (row.prompt, row.completion))
        prompt = Prompt(prompt_id(row), content, {} if row.tools is None else {TOOLS: row.tools})
        if isinstance(policy, SupportsTruncation):
            payload = policy.encode_truncated(prompt, answer, "human", max_length)
        else:
            payload = policy.encode_completion(prompt, answer, "human")
    except TooLong as error:
        return SkippedRow(row.row, "prompt too long", str(error))
    except DataError as error:
        return SkippedRow(row.row, "unfit for this model", str(error))
    names = {"sample_id": f"data/{row.row}", "prompt_id": prompt.id, "prompt": prompt.content, **prompt.columns}
    return {**names, "weight": 1.0, "origin": "data", "source": "human", **payload}


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with contents in parts joined. Raises DataError for images, which would be lost."""
    joined = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"a message must have a text; the {message['role']}'s content has other parts")
            content = "".join(map(str, texts))
        joined.append({**message, "content": content})
    return joined
