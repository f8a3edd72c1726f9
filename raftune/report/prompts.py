"""The prompts of every round with all candidates: score, verdict and reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raftune.report.choosing import PromptGroup, encoded_size, first, in_turn, order_groups, up_to
from raftune.report.pictures import ImageSet
from raftune.report.reading import RunReader
from raftune.report.samples import (
    DETAIL,
    UNREADABLE,
    content,
    cut,
    drawn_rows,
    finite,
    invalid,
    parts,
    pictures_of,
    rows_by_sample,
    seed_of,
)

MOST_PROMPTS = 600
MOST_SAMPLES = 6000
MOST_BYTES = 2_400_000
MOST_PICTURES = 6_000_000  # bytes
CHOSEN_BY = (
    "alarms that name their samples, then in turn the largest margins, prompts that yielded nothing, and a random "
    "choice by hash, spread over the rounds"
)
VERDICT = ("sample_id", "prompt_id", "score", "rank", "weight", "reason")


def prompts(reader: RunReader, named: set[str], album: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: by round, in the order of the plan; samples that are named always among them."""
    chosen, total = choose(reader, named)
    items = list(up_to(built(reader, chosen), MOST_BYTES, encoded_size))
    items = album.up_to(items, MOST_PICTURES, lambda item: pictures_of(item["samples"]))
    place = {(g.round, g.prompt_id): (g.round, g.chunk, g.number) for g in chosen}
    items.sort(key=lambda item: place[item["round"], item["id"]])
    return {"shown": len(items), "of": total, "chosen_by": CHOSEN_BY, "items": items}


def choose(reader: RunReader, named: set[str]) -> tuple[list[PromptGroup], int]:
    """The groups to show, the most instructive first, and how many there are in all."""
    wanted = {(int(s.split("/")[0]), s.split("/")[1]) for s in named if s.split("/")[0].isdigit() and s.count("/") > 1}
    total, must, rounds = 0, [], []
    for round_ in reader.rounds("generate"):
        groups = list(groups_of(reader, round_))
        total += len(groups)
        must += [g for g in groups if (g.round, g.prompt_id) in wanted]
        rounds.append(order_groups(groups, MOST_PROMPTS))
    ordered = first(chain(must, in_turn(*rounds)), MOST_PROMPTS, lambda g: (g.round, g.prompt_id))
    return up_to(ordered, MOST_SAMPLES, lambda g: g.samples), total


def groups_of(reader: RunReader, round_: int) -> Iterator[PromptGroup]:
    """Every prompt of the round that can be shown, from its verdicts or, where there are none, from its scores."""
    drawn = set(reader.chunks(round_, "generate"))
    judged: set[int] = set()
    for chunk, table in reader.verdicts(round_, ["prompt_id", "score", "weight"]):
        judged.add(chunk)
        if chunk in drawn:
            yield from summed(table, round_, chunk, pc.greater(table.column("weight"), 0))
    for chunk in sorted(drawn - judged):
        table = reader.chunk(round_, "score", chunk, ["prompt_id", "score"])
        if table is None:
            table = reader.chunk(round_, "generate", chunk, ["prompt_id"])
        if table is not None:
            yield from summed(table, round_, chunk, pa.scalar(True))


def summed(table: pa.Table, round_: int, chunk: int, kept: Any) -> Iterator[PromptGroup]:
    """The chunk's prompts, in order."""
    ids = table.column("prompt_id")
    scores = table.column("score") if "score" in table.column_names else pa.nulls(len(table), pa.float64())
    kept = pa.repeat(kept, len(table)) if isinstance(kept, pa.Scalar) else kept
    finite_scores = pc.if_else(pc.is_finite(scores), scores, pa.scalar(None, pa.float64()))
    frame = pa.table({"id": ids, "score": finite_scores, "kept": kept})
    found = frame.group_by("id", use_threads=False).aggregate(
        [("id", "count"), ("score", "max"), ("score", "mean"), ("kept", "any")]
    )
    for number, row in enumerate(found.to_pylist()):
        best, mean = row["score_max"], row["score_mean"]
        margin = None if best is None or mean is None else best - mean
        yield PromptGroup(round_, chunk, number, row["id"], row["id_count"], margin, not row["kept_any"])


def built(reader: RunReader, chosen: list[PromptGroup]) -> list[dict[str, Any]]:
    """The items of the groups that can be read, in the order of the groups."""
    by_chunk: defaultdict[tuple[int, int], list[PromptGroup]] = defaultdict(list)
    chunks: defaultdict[int, set[int]] = defaultdict(set)
    for group in chosen:
        by_chunk[group.round, group.chunk].append(group)
        chunks[group.round].add(group.chunk)
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for round_ in sorted(chunks):
        texts = reader.prompts(round_, "plan", chunks[round_])
        verdicts = verdicts_of(reader, round_, {g.prompt_id for g in chosen if g.round == round_})
        why = reader.json(round_, "select", "summary.json").get("barren")
        for chunk in sorted(chunks[round_]):
            groups = by_chunk[round_, chunk]
            samples = samples_of(reader, round_, chunk, {g.prompt_id for g in groups}, verdicts)
            for group in groups:
                item = item_of(group, texts, samples.get(group.prompt_id, []), why if isinstance(why, Mapping) else {})
                if item["samples"]:
                    found[round_, group.prompt_id] = item
    return [found[g.round, g.prompt_id] for g in chosen if (g.round, g.prompt_id) in found]


def verdicts_of(reader: RunReader, round_: int, prompt_ids: set[str]) -> dict[str, dict[str, Any]]:
    """The verdicts on the samples of these prompts, by sample id."""
    found: dict[str, dict[str, Any]] = {}
    for _, table in reader.verdicts(round_, VERDICT):
        found |= rows_by_sample(table, prompt_ids)
    return found


def samples_of(
    reader: RunReader, round_: int, chunk: int, prompt_ids: set[str], verdicts: Mapping[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The candidates of each of these prompts: the policy's samples, then other sources'."""
    scores = rows_by_sample(reader.chunk(round_, "score", chunk), prompt_ids)
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for stage in ("generate", "teach"):
        for row in drawn_rows(reader, round_, stage, chunk, prompt_ids):
            sample_id = row["sample_id"]
            found[row["prompt_id"]].append(record(row, scores.get(sample_id, {}), verdicts.get(sample_id, {})))
    return found


def record(row: Mapping[str, Any], score: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    """One candidate. What is not known is null; where the scores are lost, the verdict still holds the score."""
    return {
        "id": row["sample_id"],
        "k": row["k"],
        "source": row["source"],
        "completion": content(row.get("completion")),
        "score": finite(score.get("score", verdict.get("score"))),
        "parts": parts(score),
        "status": score.get("status"),
        "detail": cut(score.get("detail") or "", DETAIL),
        "rank": verdict.get("rank"),
        "weight": finite(verdict.get("weight")),
        "reason": verdict.get("reason"),
        "seed": seed_of(row),
        "tokens": row.get("tokens"),
        "finish": row.get("finish"),
        **invalid(row),
    }


def item_of(
    group: PromptGroup, texts: Mapping[str, Any], samples: list[dict[str, Any]], why: Mapping[str, Any]
) -> dict[str, Any]:
    reason = why.get(group.prompt_id)
    return {
        "round": group.round,
        "id": group.prompt_id,
        "prompt": content(texts.get(group.prompt_id, UNREADABLE)),
        "margin": finite(group.margin),
        "reason": None if reason is None else str(reason),
        "samples": samples,
    }
