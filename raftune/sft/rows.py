"""Training rows and held-out rows of demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from raftune.data.rows import Demonstration, SkippedRow
from raftune.errors import DataError, TooLong
from raftune.protocols import Policy, SupportsTruncation
from raftune.records import TOOLS, JsonType, Prompt, derive_seed, prompt_ids, table_of

TOO_LONG, UNFIT = "prompt too long", "unfit for this model"
MESSAGE: Final = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
ENCODED_AT_ONCE: Final = 1024


def name_of(demonstration: Demonstration) -> str:
    """The prompt's id: equal prompts have one, with tools only where those are equal too."""
    told: Any = demonstration.prompt
    return prompt_ids([told if demonstration.tools is None else [told, demonstration.tools]])[0]


def held_out_prompts(rows: Sequence[Demonstration], fraction: float) -> frozenset[str]:
    """The ids of the share of prompts that is held out: those with the lowest hashes, whatever the order of rows."""
    names = {name_of(row) for row in rows}
    ordered = sorted(names, key=lambda name: (derive_seed("hold out", name.rsplit("-", 1)[0]), name))
    return frozenset(ordered[: int(len(ordered) * fraction)])


def of_one_kind(rows: Sequence[Demonstration]) -> tuple[list[Demonstration], list[str]]:
    """The rows with prompts of one kind, which one column needs: beside messages, a text becomes a user's message."""
    texts = sum(isinstance(row.prompt, str) for row in rows)
    if texts in (0, len(rows)) or any(isinstance(row.prompt, int) for row in rows):
        return list(rows), []
    note = f"{texts:,} of {len(rows):,} prompts are texts and became a user's message, since the others are messages"
    return [as_messages(row) if isinstance(row.prompt, str) else row for row in rows], [note]


def as_messages(row: Demonstration) -> Demonstration:
    return Demonstration(
        row.row,
        [{"role": "user", "content": row.prompt}],
        [{"role": "assistant", "content": row.completion}],
        row.tools,
        row.score,
    )


def rows_schema(rows: Sequence[Demonstration], payload: pa.Schema) -> pa.Schema:
    """The columns of rows.parquet, as a round's training reads them."""
    chats, labels = (any(isinstance(row.prompt, kind) for row in rows) for kind in (list, int))
    messages = pa.list_(MESSAGE) if all(map(is_plain, rows)) else JsonType()
    prompt = messages if chats else pa.int64() if labels else pa.string()
    fields = [
        *(pa.field(name, pa.string(), nullable=False) for name in ("sample_id", "prompt_id")),
        pa.field("prompt", prompt, nullable=False),
        *([pa.field(TOOLS, JsonType())] if any(row.tools is not None for row in rows) else []),
        pa.field("weight", pa.float64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False) for name in ("origin", "source")),
    ]
    return pa.schema([*fields, *payload], metadata={"raftune.round": "0"})


def is_plain(row: Demonstration) -> bool:
    """Whether the prompt is no list of messages, or each of them has a role and a content and no more."""
    return not isinstance(row.prompt, list) or all(message.keys() == {"role", "content"} for message in row.prompt)


class EncodedDemonstrations:
    """Demonstrations as the policy reads them; what it cannot read is skipped, what it must cut is counted."""

    def __init__(self, policy: Policy, max_length: int | None) -> None:
        self.policy, self.max_length = policy, max_length
        self.skipped: list[SkippedRow] = []
        self.cut = 0

    def tables(self, rows: Sequence[Demonstration], schema: pa.Schema) -> Iterator[pa.Table]:
        """The rows, some hundreds at a time."""
        for first in range(0, len(rows), ENCODED_AT_ONCE):
            found = [row for one in rows[first : first + ENCODED_AT_ONCE] if (row := self.row(one)) is not None]
            yield table_of(found, schema)

    def row(self, one: Demonstration) -> Mapping[str, Any] | None:
        """One row of rows.parquet; None where the policy cannot read it."""
        name = name_of(one)
        try:
            content = plain(one.prompt) if isinstance(one.prompt, list) else one.prompt
            prompt = Prompt(name, content, {} if one.tools is None else {TOOLS: one.tools})
            answer = plain(one.completion) if isinstance(one.completion, list) else one.completion
            payload = self.adopted(prompt, answer)
        except TooLong as error:
            self.skipped.append(SkippedRow(one.row, TOO_LONG, str(error)))
            return None
        except DataError as error:
            self.skipped.append(SkippedRow(one.row, UNFIT, str(error)))
            return None
        self.cut += payload.get("finish") == "length"
        names = {"sample_id": f"data/{one.row}", "prompt_id": name, "prompt": prompt.content, **prompt.columns}
        return {**names, "weight": 1.0, "origin": "data", "source": "human", **payload}

    def adopted(self, prompt: Prompt, answer: Any) -> Mapping[str, Any]:
        """The payload of the answer, cut to what fits where the policy can do that."""
        if isinstance(self.policy, SupportsTruncation):
            return self.policy.encode_truncated(prompt, answer, "human", self.max_length)
        return self.policy.encode_completion(prompt, answer, "human")


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, of contents in parts the text. Raises DataError for images, which would be lost."""
    found = []
    for message in messages:
        if (text := text_of(message["content"])) is None:
            raise DataError(f"a message must have a text; the {message['role']}'s content has other parts")
        found.append({**message, "content": text})
    return found


def text_of(content: Any) -> str | None:
    """A message's text, also of one in parts; None where a part is something else."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)) if whole else None
