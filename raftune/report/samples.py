"""Samples in a report's document: long texts are cut, and non-finite numbers become null."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raftune.records import Row
from raftune.report.reading import RunReader, StageFile
from raftune.store.layout import chunk_file

LONGEST = 4000  # characters of a prompt, an answer or a message
WHOLE = 16_000  # characters of all texts of a conversation
EACH = 16  # characters that an item of a list counts beside its texts
DETAIL = 400
PICTURE = "image_sha256"
GENERATED = ("sample_id", "prompt_id", "k", "source", "seed", "completion", "completion_ids", "finish", "invalid")
HASH = re.compile("[0-9a-f]{64}")
UNREADABLE = "(not readable: the round's plan is damaged)"


def drawn_rows(reader: RunReader, round_: int, stage: str, chunk: int, prompt_ids: Iterable[str]) -> list[Row]:
    """The chunk's samples of these prompts, token ids as their number; none where the file cannot be read.

    Of images the completion is {"image": hash}; the reader then knows where they lie.
    """
    table = reader.chunk(round_, stage, chunk, answered(reader, GENERATED))
    if table is None:
        return []
    table = of_prompts(table, prompt_ids)
    if "completion_ids" in table.column_names:
        tokens = pc.list_value_length(table.column("completion_ids"))
        table = table.drop_columns(["completion_ids"]).append_column("tokens", tokens)
    rows: list[Row] = table.to_pylist()
    if reader.pictured:
        place = StageFile(round_, stage, chunk_file(chunk))
        lacks(reader, place)
        name_pictures(reader, rows, place)
    return rows


def answered(reader: RunReader, columns: Iterable[str]) -> list[str]:
    """The columns, with the name of an image in place of its bytes."""
    return [PICTURE if name == "completion" and reader.pictured else name for name in columns]


def name_pictures(reader: RunReader, rows: list[Row], place: StageFile) -> None:
    """Puts the name of its image into each row, as its completion."""
    for row in rows:
        name = row.get(PICTURE)
        row["completion"] = None
        if isinstance(name, str) and HASH.fullmatch(name):
            row["completion"] = {"image": name}
            reader.pictures.setdefault(name, place)
        elif name is not None:
            reader.note(f"round {place.round}, {place.stage}", f"{place.file} names an image by something else")


def lacks(reader: RunReader, place: StageFile) -> None:
    """Notes what a file of images should have and has not: the images, or the latents that training reads."""
    names = reader.names(place.round, place.stage, place.file)
    family = reader.config.get("policy", {}).get("family")
    wanted = ["completion", PICTURE] + (["latents"] if family == "diffusion" else [])
    for name in [name for name in wanted if names and name not in names]:
        reader.note(f"round {place.round}, {place.stage}", f"{place.file} has no column {name}")


def rows_by_sample(table: pa.Table | None, prompt_ids: Iterable[str]) -> dict[str, Row]:
    """The table's rows of these prompts by sample id; none of a table that could not be read."""
    if table is None:
        return {}
    rows: list[Row] = of_prompts(table, prompt_ids).to_pylist()
    return {row["sample_id"]: row for row in rows}


def of_prompts(table: pa.Table, prompt_ids: Iterable[str]) -> pa.Table:
    return table.filter(pc.is_in(table.column("prompt_id"), pa.array(list(prompt_ids), pa.string())))


def content(value: Any, room: list[int] | None = None) -> Any:
    """A prompt or an answer to show: texts cut at LONGEST, also inside of messages; of a list with more than WHOLE
    characters the beginning, with how many items follow. `room`: the characters that are left."""
    room = [WHOLE] if room is None else room
    if isinstance(value, str):
        room[0] -= min(len(value), LONGEST)
        return cut(value)
    if isinstance(value, list):
        shown: list[Any] = []
        for inner in value:
            if room[0] <= 0:
                more = f"… ({len(value) - len(shown):,} more)"
                return [*shown, {"role": "…", "content": more} if isinstance(inner, Mapping) else more]
            room[0] -= EACH
            shown.append(content(inner, room))
        return shown
    if isinstance(value, Mapping):
        return {str(name): content(inner, room) for name, inner in value.items() if inner is not None}
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    return finite(value) if isinstance(value, float) else value


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning with the number of characters that follow."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def finite(value: Any) -> float | None:
    """The number to six decimals; None for what is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), 6)


def parts(score: Mapping[str, Any]) -> dict[str, float | None]:
    """What each reward said, by its name."""
    return {name[8:]: finite(value) for name, value in score.items() if name.startswith("rewards/")}


def invalid(row: Mapping[str, Any]) -> dict[str, str]:
    """Why the policy made no answer of this sample, where it says so."""
    return {"invalid": cut(str(row["invalid"]), DETAIL)} if row.get("invalid") is not None else {}


def pictures_of(samples: Iterable[Row]) -> list[str]:
    """The names of the images among the completions."""
    answers = (sample.get("completion") for sample in samples)
    return [answer["image"] for answer in answers if isinstance(answer, Mapping) and "image" in answer]


def seed_of(row: Mapping[str, Any]) -> str | None:
    """The seed as text: a number of 63 bits is more than a browser's numbers hold."""
    return None if row.get("seed") is None else str(row["seed"])
