"""The training rows of every round, each with its origin and reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raftune.report.choosing import encoded_size, first, in_turn, up_to
from raftune.report.pictures import ImageSet
from raftune.report.reading import RunReader, StageFile
from raftune.report.samples import answered, content, finite, name_pictures, pictures_of

MOST_ROWS = 1500
MOST_BYTES = 900_000
MOST_PICTURES = 3_000_000  # bytes that are not shown elsewhere on the page
CHOSEN_BY = "alarms that name their samples, then a random choice by hash, spread over the rounds"
COLUMNS = ("sample_id", "prompt_id", "prompt", "weight", "origin", "source", "completion")
FILE = "rows.parquet"
REFERENCE = "a reference answer"
LearnedRow = tuple[int, str, str]  # round, origin, sample id


def learned(reader: RunReader, named: set[str], album: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: by round; samples that are named always among them."""
    rounds, must, total = [], [], 0
    for round_ in reader.rounds("rows"):
        rows = list(rows_of(reader, round_))
        total += len(rows)
        must += [row for row in rows if row[2] in named]
        rounds.append(sorted(rows, key=lambda row: (row[2].split("/")[1:], row[1]))[:MOST_ROWS])
    chosen = first(chain(must, in_turn(*rounds)), MOST_ROWS, lambda row: row)
    items = list(up_to(built(reader, chosen), MOST_BYTES, encoded_size))
    items = album.up_to(items, MOST_PICTURES, lambda item: pictures_of([item]))
    items.sort(key=lambda item: item["round"])
    return {"shown": len(items), "of": total, "chosen_by": CHOSEN_BY, "items": items}


def rows_of(reader: RunReader, round_: int) -> Iterator[LearnedRow]:
    """Round, origin and sample id of every row."""
    for table in reader.groups(round_, "rows", FILE, ["sample_id", "origin"]):
        columns = (table.column(name).to_pylist() for name in ("origin", "sample_id"))
        yield from ((round_, origin, sample_id) for origin, sample_id in zip(*columns, strict=True))


def built(reader: RunReader, chosen: list[LearnedRow]) -> list[dict[str, Any]]:
    """The items, in the order in which they were chosen."""
    by_round: defaultdict[int, set[str]] = defaultdict(set)
    by_origin: defaultdict[str, set[str]] = defaultdict(set)
    for round_, origin, sample_id in chosen:
        by_round[round_].add(sample_id)
        by_origin[origin].add(sample_id)
    verdicts = {origin: verdicts_on(reader, origin, ids) for origin, ids in by_origin.items()}
    found = {}
    for round_, ids in by_round.items():
        for table in reader.groups(round_, "rows", FILE, answered(reader, COLUMNS)):
            rows = table.filter(pc.is_in(table.column("sample_id"), pa.array(sorted(ids)))).to_pylist()
            if reader.pictured:
                name_pictures(reader, rows, StageFile(round_, "rows", FILE))
            for row in rows:
                verdict = verdicts[row["origin"]].get(row["sample_id"], {}) if row["origin"] in verdicts else {}
                found[round_, row["origin"], row["sample_id"]] = item_of(round_, row, verdict)
    return [found[row] for row in chosen if row in found]


def verdicts_on(reader: RunReader, origin: str, ids: set[str]) -> dict[str, dict[str, Any]]:
    """Score and reason of these samples in the round that they are from; nothing of reference answers."""
    number = origin.removeprefix("round-")
    if not number.isdigit():
        return {}
    found = {}
    for _, table in reader.verdicts(int(number), ["sample_id", "score", "reason"]):
        for row in table.filter(pc.is_in(table.column("sample_id"), pa.array(sorted(ids)))).to_pylist():
            found[row["sample_id"]] = row
    return found


def item_of(round_: int, row: Mapping[str, Any], verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "round": round_,
        "origin": row["origin"],
        "source": row["source"],
        "sample_id": row["sample_id"],
        "prompt_id": row["prompt_id"],
        "prompt": content(row.get("prompt")),
        "completion": content(row.get("completion")),
        "weight": finite(row["weight"]),
        "score": finite(verdict.get("score")),
        "reason": verdict.get("reason") or (REFERENCE if row["origin"] == "reference" else None),
    }
