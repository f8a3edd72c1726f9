"""Held-out samples of the same prompt and seed in every round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from raftune.report.choosing import HeldOutPair, encoded_size, first, order_pairs, up_to
from raftune.report.pictures import ImageSet
from raftune.report.reading import RunReader
from raftune.report.samples import (
    UNREADABLE,
    content,
    drawn_rows,
    finite,
    invalid,
    parts,
    pictures_of,
    rows_by_sample,
    seed_of,
)

MOST_ANSWERS = 3000
MOST_BYTES = 1_200_000
MOST_PICTURES = 5_000_000  # bytes
MOST_ROUNDS = 10  # of which images are shown
CHOSEN_BY = (
    "alarms that name their samples, then in turn the largest gains and the largest losses from the start to the best "
    "round, and a random choice by hash"
)
SampleKey = tuple[str, int]


def compared(reader: RunReader, named: set[str], best: int, album: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: by prompt and k; samples that are named always among them.

    Of images also `rounds`, those of which they are shown, and `of_rounds`, how many there are.
    """
    rounds = reader.rounds("evaluate/generate")
    pairs = list(pairs_of(reader, rounds, best))
    wanted = {key for sample_id in named if (key := key_of(sample_id))}
    must = [pair for pair in pairs if (pair.prompt_id, pair.k) in wanted]
    most = max(1, MOST_ANSWERS // max(1, len(rounds)))
    chosen = first(chain(must, order_pairs(pairs, most)), most, lambda p: (p.prompt_id, p.k))
    items = list(up_to(built(reader, rounds, chosen), MOST_BYTES, encoded_size))
    seen = rounds_seen(rounds, best, {int(s[:4]) for s in named if key_of(s) and s[:4].isdigit()})
    items = album.up_to(items, MOST_PICTURES, lambda item: pictures_of(seen_answers(item, seen)))
    place = {(pair.prompt_id, pair.k): number for number, pair in enumerate(pairs)}
    items.sort(key=lambda item: place[item["prompt_id"], item["k"]])
    told = {"rounds": seen, "of_rounds": len(rounds)} if reader.pictured else {}
    return {"shown": len(items), "of": len(pairs), "chosen_by": CHOSEN_BY, "items": items, **told}


def rounds_seen(rounds: list[int], best: int, named: set[int]) -> list[int]:
    """The rounds of which images are shown: the start, the best, the last, those of alarms, and others evenly."""
    if len(rounds) <= MOST_ROUNDS:
        return rounds
    must = [r for r in rounds if r in {rounds[0], best, rounds[-1]}]
    evenly = [rounds[round(i * (len(rounds) - 1) / (MOST_ROUNDS - 1))] for i in range(MOST_ROUNDS)]
    return sorted(first(chain(must, sorted(named & set(rounds)), evenly), MOST_ROUNDS, lambda r: r))


def seen_answers(item: Mapping[str, Any], rounds: list[int]) -> list[dict[str, Any]]:
    return [item["answers"][str(round_)] for round_ in rounds if str(round_) in item["answers"]]


def key_of(sample_id: str) -> SampleKey | None:
    """Prompt and k of a held-out sample's id, such as 0003e/1f2e-0/002; None of another id."""
    scope, _, rest = sample_id.partition("/")
    prompt_id, _, k = rest.rpartition("/")
    return (prompt_id, int(k)) if scope.endswith("e") and k.isdigit() else None


def pairs_of(reader: RunReader, rounds: list[int], best: int) -> Iterator[HeldOutPair]:
    """Every held-out sample, as the first round with evaluations has them."""
    if not rounds:
        return
    start, end = rounds[0], best if best in rounds else rounds[-1]
    for chunk in reader.chunks(start, "evaluate/generate"):
        drawn = reader.chunk(start, "evaluate/generate", chunk, ["prompt_id", "k"])
        if drawn is None:
            continue
        before, after = (scores_of(reader, round_, chunk) for round_ in (start, end))
        for prompt_id, k in zip(drawn.column("prompt_id").to_pylist(), drawn.column("k").to_pylist(), strict=True):
            old, new = before.get((prompt_id, k)), after.get((prompt_id, k))
            yield HeldOutPair(chunk, prompt_id, k, None if old is None or new is None or start == end else new - old)


def scores_of(reader: RunReader, round_: int, chunk: int) -> dict[SampleKey, float | None]:
    """The scores of a round's held-out samples; None where there is none."""
    table = reader.chunk(round_, "evaluate/score", chunk, ["prompt_id", "k", "score"])
    if table is None:
        return {}
    columns = (table.column(name).to_pylist() for name in ("prompt_id", "k", "score"))
    return {(prompt_id, k): finite(score) for prompt_id, k, score in zip(*columns, strict=True)}


def built(reader: RunReader, rounds: list[int], chosen: list[HeldOutPair]) -> list[dict[str, Any]]:
    """The items, in the order in which they were chosen."""
    chunks: defaultdict[int, set[str]] = defaultdict(set)
    for pair in chosen:
        chunks[pair.chunk].add(pair.prompt_id)
    wanted = {(pair.prompt_id, pair.k) for pair in chosen}
    answers: defaultdict[SampleKey, dict[str, Any]] = defaultdict(dict)
    seeds: dict[SampleKey, str | None] = {}
    texts: dict[str, Any] = {}
    for round_ in rounds:
        if not texts:
            texts = reader.prompts(round_, "evaluate/plan", set(chunks))
        for chunk, prompt_ids in sorted(chunks.items()):
            for key, seed, answer in answers_of(reader, round_, chunk, prompt_ids):
                if key in wanted:
                    answers[key][str(round_)] = answer
                    seeds.setdefault(key, seed)
    return [
        {
            "prompt_id": pair.prompt_id,
            "prompt": content(texts.get(pair.prompt_id, UNREADABLE)),
            "k": pair.k,
            "seed": seeds[pair.prompt_id, pair.k],
            "answers": answers[pair.prompt_id, pair.k],
        }
        for pair in chosen
        if answers[pair.prompt_id, pair.k]
    ]


def answers_of(
    reader: RunReader, round_: int, chunk: int, prompt_ids: set[str]
) -> Iterator[tuple[SampleKey, str | None, dict[str, Any]]]:
    """Key, seed and answer of each of the chunk's samples of these prompts."""
    scores = rows_by_sample(reader.chunk(round_, "evaluate/score", chunk), prompt_ids)
    judged = rows_by_sample(reader.chunk(round_, "evaluate/judge", chunk), prompt_ids)
    for row in drawn_rows(reader, round_, "evaluate/generate", chunk, prompt_ids):
        sample_id = row["sample_id"]
        yield (
            (row["prompt_id"], row["k"]),
            seed_of(row),
            answer_of(row, scores.get(sample_id, {}), judged.get(sample_id, {})),
        )


def answer_of(row: Mapping[str, Any], score: Mapping[str, Any], judged: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["sample_id"],
        "completion": content(row.get("completion")),
        "score": finite(score.get("score")),
        "held_out": finite(judged.get("score")),
        "parts": parts(score) | {name: value for name, value in parts(judged).items() if name not in parts(score)},
        "tokens": row.get("tokens"),
        "finish": row.get("finish"),
        **invalid(row),
    }
