"""Reads the samples of a round with prompts, scores and verdicts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.data.images import in_words
from raftune.errors import ConfigError, StoreError
from raftune.records import TOOLS, Row
from raftune.results.summary import best_round
from raftune.store.kinds import how_to_go_on
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_groups, read_table
from raftune.store.run import RunFolder

VERDICT = ("ranked_by", "rank", "weight", "reason")
IDENTITY = ("sample_id", "prompt_id", "k", "source")


def choose_rounds(run: RunFolder, which: str) -> list[int]:
    """The rounds that `all`, `best` or a number stands for. Raises ConfigError, StoreError."""
    known = run.rounds_with("select")
    if not known:
        raise StoreError(f"{run.root} has no round with verdicts. {how_to_go_on(run.root, run.read_config())}")
    if which == "all":
        return known
    if which == "best":
        best = best_round(run.root)
        if not best:
            raise ConfigError("--round best: the best round is the start, which learned from nothing. Name a round.")
        return [best]
    if not which.isdigit() or int(which) not in known:
        raise ConfigError(f"--round must be all, best or one of {span(known)}; got {which!r}. Choose one of these.")
    return [int(which)]


def training_chunks(run: RunFolder, round_: int) -> Iterator[list[Row]]:
    """Chunk by chunk, the samples that the round chose from: identity, prompt, completion, score, parts, verdict."""
    commit = run.commit(round_, "score") if run.was_made(round_, "score") else None
    inputs = commit.inputs if commit is not None else {}
    shards = [name for name in ("generate", "teach") if f"{round_}/{name}" in inputs and run.was_made(round_, name)]
    verdicts = read_table(run.folder(round_, "select") / "verdicts.parquet", VERDICT)
    plan, at = run.folder(round_, "plan"), 0
    has_tools = TOOLS in column_names(plan / "prompts.parquet")
    for chunk in chunk_numbers(*(run.folder(round_, name) for name in ("score", *shards))):
        generated = [read_drawn(run.folder(round_, shard) / chunk_file(chunk)) for shard in shards]
        scores = read_table(run.folder(round_, "score") / chunk_file(chunk))
        verdict = verdicts.slice(at, scores.num_rows)
        at += scores.num_rows
        samples = joined(pa.concat_tables(generated), prompts_of(plan, chunk), scores, verdict)
        if has_tools:
            tools = prompts_of(plan, chunk, TOOLS)
            for sample in samples:
                sample[TOOLS] = tools[sample["prompt_id"]]
        yield samples


def held_out_chunks(run: RunFolder, round_: int) -> Iterator[list[Row]]:
    """Chunk by chunk, the samples that the round was judged by; `held_out` is the score of held-out rewards, if any."""
    folder = run.folder(round_, "evaluate")
    is_judged = run.was_made(round_, "evaluate/judge")
    for chunk in chunk_numbers(folder / "score", folder / "generate"):
        generated = read_drawn(folder / "generate" / chunk_file(chunk))
        scores = read_table(folder / "score" / chunk_file(chunk))
        judged = folder / "judge" / chunk_file(chunk)
        held_out = read_table(judged, ["score"]).rename_columns(["held_out"]) if is_judged else None
        yield joined(generated, prompts_of(folder / "plan", chunk), scores, held_out)


def read_drawn(path: Path) -> pa.Table:
    """What was generated, without the columns that only the policy reads."""
    return read_table(path, [*IDENTITY, "completion", "completion_ids", "finish", "image_sha256"])


def prompts_of(plan: Path, chunk: int, column: str = "prompt") -> dict[str, Any]:
    """The prompts of the chunk by id, or another column of theirs."""
    for index, group in enumerate(read_groups(plan / "prompts.parquet", ["prompt_id", column])):
        if index == chunk:
            return dict(zip(group.column("prompt_id").to_pylist(), group.column(column).to_pylist(), strict=True))
    raise AssertionError(f"the plan {plan} has no chunk {chunk}")


def joined(generated: pa.Table, prompts: dict[str, Any], *others: pa.Table | None) -> list[Row]:
    """The tables side by side, row for row, each row with its prompt; columns that repeat are taken from the first."""
    rows: list[Row] = generated.to_pylist()
    for table in others:
        if table is not None:
            for row, more in zip(rows, table.to_pylist(), strict=True):
                row |= {name: value for name, value in more.items() if name not in row}
    for row in rows:
        row["prompt"] = prompts[row["prompt_id"]]
    return rows


def find_samples(run: RunFolder, round_: int, names: Collection[str]) -> dict[str, Row]:
    """Those of the named samples that the round chose from, or was judged by, by their sample_id."""
    samples_: dict[str, Row] = {}
    for chunks in (training_chunks, held_out_chunks):
        if len(samples_) < len(names):
            for samples in chunks(run, round_):
                samples_ |= {sample["sample_id"]: sample for sample in samples if sample["sample_id"] in names}
    return samples_


def by_prompt(samples: list[Row]) -> Iterator[list[Row]]:
    """The samples of each prompt, in the order in which the prompts appear."""
    groups: dict[str, list[Row]] = {}
    for sample in samples:
        groups.setdefault(sample["prompt_id"], []).append(sample)
    yield from groups.values()


def usable(samples: list[Row]) -> list[Row]:
    """The samples that have a score."""
    return [sample for sample in samples if sample["status"] == "ok" and sample["score"] is not None]


def readable(answer: Any) -> Any:
    """A completion as a line or JSON can hold it: an image as its name and size; anything else as it is."""
    return in_words(answer) if isinstance(answer, bytes) else answer


def answer_text(answer: Any) -> str:
    """A completion as one text; empty where there is none."""
    return "" if answer is None else str(readable(answer))


def span(rounds: list[int]) -> str:
    """Round numbers in words: 1 … 8, or 1, 3."""
    consecutive = rounds == list(range(rounds[0], rounds[-1] + 1))
    return f"{rounds[0]} … {rounds[-1]}" if consecutive and len(rounds) > 2 else ", ".join(map(str, rounds))


def prompt_text(prompt: Any) -> str:
    """The prompt as one text; of messages, the last."""
    if isinstance(prompt, list):
        return str(prompt[-1].get("content", ""))
    return str(prompt)
