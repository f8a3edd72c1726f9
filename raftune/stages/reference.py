"""Stage `evaluation reference`: log-probabilities of reference completions to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.errors import DataError
from raftune.protocols import Policy, PolicyProvider, StageInputs, SupportsLogProbs
from raftune.records import Prompt
from raftune.stages.plan import read_plan, read_prompts
from raftune.store.parquet import write_table

SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("reference_log_prob", pa.float64()),
        pa.field("tokens", pa.int64()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
EMPTY = "the answer is empty"


class ReferenceStage:
    """One file per chunk, one row per prompt: `reference_log_prob` (nats) and `tokens` of its reference completion.

    The answer is encoded as if the policy had generated it, the prompt put as it is when generating. Where it is empty
    or unfit for the model, both are null and `detail` says why.
    """

    local = False
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

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def chunks(self, inputs: StageInputs) -> list[int]:
        return list(range(read_plan(inputs["evaluate/plan"])["num_units"]))

    def run_chunk(self, inputs: StageInputs, index: int, out: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
        policy = self.policies.at(inputs["model"])
        assert isinstance(policy, SupportsLogProbs)  # planning has made sure of it
        prompts = read_prompts(inputs["evaluate/plan"], index)
        found = [encoded(policy, prompt, self.column) for prompt in prompts]
        asked = [prompt for prompt, answer in zip(prompts, found, strict=True) if not isinstance(answer, str)]
        answers = pa.Table.from_pylist([a for a in found if not isinstance(a, str)], schema=policy.payload)
        size = int(metadata.get("batch_size", read_plan(inputs["evaluate/plan"])["batch_size"]))
        values = policy.log_probs(asked, answers, size) if asked else np.empty(0)
        write_table(rows_of(prompts, found, values.tolist(), tokens_of(answers)), out, metadata)
        return remarks(found, index, self.column)


def encoded(policy: Policy, prompt: Prompt, column: str) -> Mapping[str, Any] | str:
    """The payload of the prompt's reference answer; or why there is none. Raises DataError without such a column."""
    if column not in prompt.columns:
        raise no_such_column(column, list(prompt.columns))
    answer = prompt.columns[column]
    if is_empty(answer):
        return EMPTY
    try:
        return policy.encode_completion(prompt, answer, f"column:{column}")
    except DataError as error:
        return str(error)


def rows_of(
    prompts: Sequence[Prompt], found: Sequence[Any], values: Sequence[float], tokens: Sequence[int]
) -> pa.Table:
    """A row for each prompt; `values` and `tokens` are those of the prompts that have an answer, in order."""
    measured = iter(zip(values, tokens, strict=True))
    rows = [(None, None, answer) if isinstance(answer, str) else (*next(measured), "") for answer in found]
    columns = [[prompt.id for prompt in prompts], *map(list, zip(*rows, strict=True))]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)


def tokens_of(answers: pa.Table) -> list[int]:
    """How many choices each answer consists of: its tokens, or one for a family without any."""
    if "completion_ids" not in answers.column_names:
        return [1] * answers.num_rows
    counts: list[int] = pc.list_value_length(answers.column("completion_ids")).to_pylist()
    return counts


def remarks(found: Sequence[Any], index: int, column: str) -> tuple[str, ...]:
    """What was left out, counted, with the first reason."""
    reasons = [answer for answer in found if isinstance(answer, str)]
    if not reasons:
        return ()
    counted = f"{len(reasons)} of {len(found)} held-out prompts of chunk {index} have no usable answer in {column!r}"
    return (f"{counted}, and are left out of the perplexity: {reasons[0].rstrip('.')}",)


def check_references(held_out: pa.Table, column: str) -> None:
    """Raises DataError where the held-out prompts have no such column, or nothing in it."""
    if column not in held_out.column_names:
        raise no_such_column(column, [name for name in held_out.column_names if name not in ("prompt_id", "prompt")])
    answers = held_out.column(column).to_pylist()
    if answers and all(map(is_empty, answers)):
        raise DataError(
            f"evaluation.reference_column must hold answers; the {len(answers)} held-out prompts have none in "
            f"{column!r}. Name another column, or leave it out."
        )


def no_such_column(column: str, known: Sequence[str]) -> DataError:
    return DataError(
        f"evaluation.reference_column must name a column of the held-out prompts; got {column!r}, and they have "
        f"{', '.join(known) or 'no other columns'}. Name one of these, or leave it out."
    )


def is_empty(answer: Any) -> bool:
    """Whether there is no answer: nothing, a blank text, no message, or one of blank content."""
    if isinstance(answer, list):
        return not answer or (len(answer) == 1 and isinstance(answer[0], dict) and is_empty(answer[0].get("content")))
    return answer is None or (isinstance(answer, str) and not answer.strip())
