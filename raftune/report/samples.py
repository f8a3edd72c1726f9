"""The samples that a report shows: candidates by round, held-out samples over the rounds, and training rows.

What does not fit is chosen: samples that alarms name, then the most instructive ones and a random choice by hash, in
turn. Long texts are cut, and numbers that are not finite become null.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from raftune.records import Row
from raftune.report.images import PICTURE, ImageSet
from raftune.report.reading import RunReader, StageFile
from raftune.store.layout import chunk_file

MOST_PROMPTS, MOST_SAMPLES, PROMPT_BYTES, PROMPT_PICTURES = 600, 6000, 2_400_000, 6_000_000
MOST_ANSWERS, ANSWER_BYTES, ANSWER_PICTURES = 3000, 1_200_000, 5_000_000
MOST_ROWS, ROW_BYTES, ROW_PICTURES = 1500, 900_000, 3_000_000  # pictures: bytes of those not shown elsewhere
MOST_ROUNDS = 10  # of which images are compared
LONGEST = 4000  # characters of a prompt, a completion or a message
WHOLE = 16_000  # characters of all texts of a conversation
EACH = 16  # characters that an item of a list counts beside its texts
DETAIL = 400
GENERATED = ("sample_id", "prompt_id", "k", "source", "seed", "completion", "completion_ids", "finish", "invalid")
VERDICT = ("sample_id", "prompt_id", "score", "rank", "weight", "reason")
LEARNED = ("sample_id", "prompt_id", "prompt", "weight", "origin", "source", "completion")
HASH = re.compile("[0-9a-f]{64}")
HELD_OUT = re.compile(r"(?P<round>\d{4,})e/(?P<prompt>.+)/(?P<k>\d+)")  # the id of a held-out sample
UNREADABLE = "(not readable: the round's plan is damaged)"
# What could end the element that the document stands in, what JavaScript takes for line ends, and half characters,
# which no file can hold. JSON allows each of them as an escape.
_RISKY = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
PROMPTS_BY = (
    "alarms that name their samples, then in turn the largest margins, prompts without kept samples, and a random "
    "choice by hash, spread over the rounds"
)
ANSWERS_BY = (
    "alarms that name their samples, then in turn the largest gains and the largest losses from the start to the best "
    "round, and a random choice by hash"
)
ROWS_BY = "alarms that name their samples, then a random choice by hash, spread over the rounds"
Item = TypeVar("Item")


# -- choosing ---------------------------------------------------------------------------------------------------------


class PromptGroup(NamedTuple):
    """The samples of one prompt in one round: how many, how far the best is above their mean, and whether none is kept.

    `number` is the prompt's place in its chunk; `margin` is None where nothing could be scored.
    """

    round: int
    chunk: int
    number: int
    prompt_id: str
    samples: int
    margin: float | None
    without_candidates: bool


class HeldOutPair(NamedTuple):
    """One held-out prompt and sample, in all rounds; `gain` is the best round's score less the start's, if known."""

    chunk: int
    prompt_id: str
    k: int
    gain: float | None


def order_groups(groups: Sequence[PromptGroup], most: int) -> list[PromptGroup]:
    """The most instructive prompts of a round first: largest margins, those without kept samples, and by hash, in turn.

    A prompt's id is a hash: the smallest ids are a random choice, and the same one in every round.
    """
    by_margin = sorted((g for g in groups if g.margin is not None), key=lambda g: -(g.margin or 0.0))
    by_hash = sorted(groups, key=lambda g: g.prompt_id)
    without_candidates = [g for g in by_hash if g.without_candidates]
    return first(in_turn(by_margin, without_candidates, by_hash), most, lambda g: g.prompt_id)


def order_pairs(pairs: Sequence[HeldOutPair], most: int) -> list[HeldOutPair]:
    """The most instructive held-out samples first: largest gains, largest losses, and by hash, in turn."""
    by_gain = sorted((p for p in pairs if p.gain is not None), key=lambda p: -(p.gain or 0.0))
    by_hash = sorted(pairs, key=lambda p: (p.k, p.prompt_id))
    return first(in_turn(by_gain, by_gain[::-1], by_hash), most, lambda p: (p.prompt_id, p.k))


def in_turn(*lists: Iterable[Item]) -> Iterator[Item]:
    """The first of each list, then the second of each, and so on."""
    boxed = (([item] for item in items) for items in lists)
    for turn in zip_longest(*boxed, fillvalue=[]):
        yield from chain.from_iterable(turn)


def first(items: Iterable[Item], most: int, key: Callable[[Item], Hashable]) -> list[Item]:
    """The first `most` items of different keys."""
    chosen: dict[Hashable, Item] = {}
    for item in items:
        if len(chosen) >= most:
            break
        chosen.setdefault(key(item), item)
    return list(chosen.values())


def up_to(items: Iterable[Item], most: int, size: Callable[[Item], int]) -> list[Item]:
    """The first items whose sizes sum to no more than `most`; one at least."""
    kept: list[Item] = []
    total = 0
    for item in items:
        total += size(item)
        if kept and total > most:
            break
        kept.append(item)
    return kept


def shown(
    items: list[Row],
    total: int,
    chosen_by: str,
    images: ImageSet,
    limits: tuple[int, int],
    samples: Callable[[Row], Iterable[Row]],
    order: Callable[[Row], Any],
) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: the first items that fit into so many bytes of texts and of images, in order."""
    items = up_to(items, limits[0], encoded_size)
    items = images.up_to(items, limits[1], lambda item: images_of(samples(item)))
    return {"shown": len(items), "of": total, "chosen_by": chosen_by, "items": sorted(items, key=order)}


def encoded_size(item: Any) -> int:
    """The bytes that the item takes in the page after escaping, which makes six bytes of each `<`."""
    return len(embedded(item).encode())


def embedded(document: Any) -> str:
    """The document, or a part of it, as JSON in which no character can end its element."""
    content = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _RISKY.sub(lambda match: f"\\u{ord(match[0]):04x}", content)


# -- the candidates of every round ------------------------------------------------------------------------------------


def prompts(reader: RunReader, named: set[str], images: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: prompts by round, in the order of the plan, with all candidates: score, verdict
    and reason. Samples that are named are always among them."""
    named_prompts = {tuple(name.split("/")[:2]) for name in named if name.count("/") > 1}
    total, must, rounds = 0, [], []
    for round_ in reader.rounds("generate"):
        groups = list(groups_of(reader, round_))
        total += len(groups)
        must += [g for g in groups if (f"{g.round:04d}", g.prompt_id) in named_prompts]
        rounds.append(order_groups(groups, MOST_PROMPTS))
    chosen = first(chain(must, in_turn(*rounds)), MOST_PROMPTS, lambda g: (g.round, g.prompt_id))
    chosen = up_to(chosen, MOST_SAMPLES, lambda g: g.samples)
    order = {(g.round, g.prompt_id): g[:3] for g in chosen}
    return shown(
        prompt_items(reader, chosen),
        total,
        PROMPTS_BY,
        images,
        (PROMPT_BYTES, PROMPT_PICTURES),
        lambda item: item["samples"],
        lambda item: order[item["round"], item["id"]],
    )


def groups_of(reader: RunReader, round_: int) -> Iterator[PromptGroup]:
    """Every prompt of the round that can be shown, from its verdicts or, where there are none, from its scores."""
    generated = dict.fromkeys(reader.chunks(round_, "generate"))
    verdicts = reader.verdicts(round_, ["prompt_id", "score", "weight"])
    selected: set[int] = set()
    for chunk, table in chain(verdicts, ((chunk, None) for chunk in generated if chunk not in selected)):
        if table is not None:
            selected.add(chunk)
        else:
            table = reader.chunk(round_, "score", chunk, ["prompt_id", "score"])
            table = table if table is not None else reader.chunk(round_, "generate", chunk, ["prompt_id"])
        if table is None or chunk not in generated:
            continue
        names, nothing = table.column_names, pa.nulls(len(table), pa.float64())
        scores = table.column("score") if "score" in names else nothing
        scores = pc.if_else(pc.is_finite(scores), scores, pa.scalar(None, pa.float64()))
        kept = pc.greater(table.column("weight"), 0) if "weight" in names else pa.repeat(pa.scalar(True), len(table))
        columns = pa.table({"id": table.column("prompt_id"), "score": scores, "kept": kept})
        aggregates = [("id", "count"), ("score", "max"), ("score", "mean"), ("kept", "any")]
        groups = columns.group_by("id", use_threads=False).aggregate(aggregates).to_pylist()
        for number, row in enumerate(groups):
            margin = None if row["score_max"] is None else row["score_max"] - row["score_mean"]
            yield PromptGroup(round_, chunk, number, row["id"], row["id_count"], margin, not row["kept_any"])


def prompt_items(reader: RunReader, chosen: list[PromptGroup]) -> list[dict[str, Any]]:
    """The items of the groups that can be read, in their order, each with the policy's samples, then other sources'.

    What is not known is null; where the scores are lost, the verdict still holds the score.
    """
    by_chunk: defaultdict[int, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for group in chosen:
        by_chunk[group.round][group.chunk].add(group.prompt_id)
    texts: dict[tuple[int, str], Any] = {}
    reasons: dict[int, Any] = {}
    samples: defaultdict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for round_, chunks in sorted(by_chunk.items()):
        prompts = reader.prompts(round_, "plan", set(chunks))
        texts |= {(round_, prompt_id): text for prompt_id, text in prompts.items()}
        verdicts: dict[str, Row] = {}
        for _, table in reader.verdicts(round_, VERDICT):
            verdicts |= rows_by_sample(table, set().union(*chunks.values()))
        reasons[round_] = reader.json(round_, "select", "summary.json").get("empty_prompts")
        for chunk, prompt_ids in sorted(chunks.items()):
            scores = rows_by_sample(reader.chunk(round_, "score", chunk), prompt_ids)
            stages = ("generate", "teach")
            for row in chain(*(generated_rows(reader, round_, stage, chunk, prompt_ids) for stage in stages)):
                score, verdict = scores.get(row["sample_id"], {}), verdicts.get(row["sample_id"], {})
                sample = {
                    **sample_of(row),
                    "k": row["k"],
                    "source": row["source"],
                    "score": finite(score.get("score", verdict.get("score"))),
                    "parts": parts(score),
                    "status": score.get("status"),
                    "detail": cut(score.get("detail") or "", DETAIL),
                    "rank": verdict.get("rank"),
                    "weight": finite(verdict.get("weight")),
                    "reason": verdict.get("reason"),
                    "seed": seed_of(row),
                }
                samples[round_, row["prompt_id"]].append(sample)
    items = []
    for group in chosen:
        key, empty = (group.round, group.prompt_id), reasons[group.round]
        reason = empty.get(group.prompt_id) if isinstance(empty, Mapping) else None
        if key in samples:
            items.append(
                {
                    "round": group.round,
                    "id": group.prompt_id,
                    "prompt": content(texts.get(key, UNREADABLE)),
                    "margin": finite(group.margin),
                    "reason": None if reason is None else str(reason),
                    "samples": samples[key],
                }
            )
    return items


# -- held-out samples over the rounds ---------------------------------------------------------------------------------


def compared(reader: RunReader, named: set[str], best: int, images: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: held-out samples of one prompt and seed in every round, by prompt and k; samples
    that are named are always among them.

    Of images also `rounds`, those of which they are shown, and `of_rounds`, how many there are.
    """
    rounds = reader.rounds("evaluate/generate")
    pairs = list(pairs_of(reader, rounds, best))
    matches = [match for name in named if (match := HELD_OUT.fullmatch(name))]
    named_pairs = {(match["prompt"], int(match["k"])) for match in matches}
    must = [pair for pair in pairs if (pair.prompt_id, pair.k) in named_pairs]
    most = max(1, MOST_ANSWERS // max(1, len(rounds)))
    chosen = first(chain(must, order_pairs(pairs, most)), most, lambda p: (p.prompt_id, p.k))
    seen = rounds_seen(rounds, best, {int(match["round"]) for match in matches})
    order = {(pair.prompt_id, pair.k): number for number, pair in enumerate(pairs)}
    result = shown(
        pair_items(reader, rounds, chosen),
        len(pairs),
        ANSWERS_BY,
        images,
        (ANSWER_BYTES, ANSWER_PICTURES),
        lambda item: [item["answers"][str(r)] for r in seen if str(r) in item["answers"]],
        lambda item: order[item["prompt_id"], item["k"]],
    )
    return result | ({"rounds": seen, "of_rounds": len(rounds)} if reader.pictured else {})


def rounds_seen(rounds: list[int], best: int, named: set[int]) -> list[int]:
    """The rounds of which images are shown: the start, the best, the last, those of alarms, and others evenly."""
    if len(rounds) <= MOST_ROUNDS:
        return rounds
    must = [r for r in rounds if r in {rounds[0], best, rounds[-1]}]
    evenly = [rounds[round(i * (len(rounds) - 1) / (MOST_ROUNDS - 1))] for i in range(MOST_ROUNDS)]
    return sorted(first(chain(must, sorted(named & set(rounds)), evenly), MOST_ROUNDS, lambda r: r))


def pairs_of(reader: RunReader, rounds: list[int], best: int) -> Iterator[HeldOutPair]:
    """Every held-out sample, as the first round with evaluations has them."""
    start, end = (rounds[0], best if best in rounds else rounds[-1]) if rounds else (0, 0)
    for chunk in reader.chunks(start, "evaluate/generate"):
        generated = reader.chunk(start, "evaluate/generate", chunk, ["prompt_id", "k"])
        if generated is None:
            continue
        scores: list[dict[tuple[str, int], float | None]] = []
        for round_ in (start, end):
            table = reader.chunk(round_, "evaluate/score", chunk, ["prompt_id", "k", "score"])
            rows = table.to_pylist() if table is not None else []
            scores.append({(row["prompt_id"], row["k"]): finite(row["score"]) for row in rows})
        for row in generated.to_pylist():
            key = (row["prompt_id"], row["k"])
            old, new = (values.get(key) for values in scores)
            yield HeldOutPair(chunk, *key, None if old is None or new is None or start == end else new - old)


def pair_items(reader: RunReader, rounds: list[int], chosen: list[HeldOutPair]) -> list[dict[str, Any]]:
    """The items, in the order in which they were chosen."""
    chunks: defaultdict[int, set[str]] = defaultdict(set)
    for pair in chosen:
        chunks[pair.chunk].add(pair.prompt_id)
    items: dict[tuple[str, int], dict[str, Any]] = {
        (pair.prompt_id, pair.k): {"prompt_id": pair.prompt_id, "k": pair.k, "answers": {}} for pair in chosen
    }
    texts: dict[str, Any] = {}
    for round_ in rounds:
        texts = texts or reader.prompts(round_, "evaluate/plan", set(chunks))
        for chunk, prompt_ids in sorted(chunks.items()):
            scores = rows_by_sample(reader.chunk(round_, "evaluate/score", chunk), prompt_ids)
            judged = rows_by_sample(reader.chunk(round_, "evaluate/judge", chunk), prompt_ids)
            for row in generated_rows(reader, round_, "evaluate/generate", chunk, prompt_ids):
                if item := items.get((row["prompt_id"], row["k"])):
                    score, verdict = scores.get(row["sample_id"], {}), judged.get(row["sample_id"], {})
                    item.setdefault("seed", seed_of(row))
                    item["answers"][str(round_)] = {
                        **sample_of(row),
                        "score": finite(score.get("score")),
                        "held_out": finite(verdict.get("score")),
                        "parts": {**parts(score), **parts(verdict), **parts(score)},
                    }
    for item in items.values():
        item["prompt"] = content(texts.get(item["prompt_id"], UNREADABLE))
    return [item for item in items.values() if item["answers"]]


# -- training rows ----------------------------------------------------------------------------------------------------


def learned(reader: RunReader, named: set[str], images: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: training rows by round, each with its origin, score and reason; samples that are
    named are always among them."""
    rounds, must, total = [], [], 0
    for round_ in reader.rounds("rows"):
        rows = []  # (round, origin, sample id)
        for table in reader.groups(round_, "rows", "rows.parquet", ["sample_id", "origin"]):
            rows += [(round_, row["origin"], row["sample_id"]) for row in table.to_pylist()]
        total += len(rows)
        must += [row for row in rows if row[2] in named]
        rounds.append(sorted(rows, key=lambda row: (row[2].split("/")[1:], row[1]))[:MOST_ROWS])
    chosen = first(chain(must, in_turn(*rounds)), MOST_ROWS, lambda row: row)
    limits = (ROW_BYTES, ROW_PICTURES)
    return shown(
        row_items(reader, chosen), total, ROWS_BY, images, limits, lambda item: [item], lambda item: item["round"]
    )


def row_items(reader: RunReader, chosen: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """The items, in the order in which they were chosen."""
    by_round: defaultdict[int, set[str]] = defaultdict(set)
    by_origin: defaultdict[str, set[str]] = defaultdict(set)
    for round_, origin, sample_id in chosen:
        by_round[round_].add(sample_id)
        by_origin[origin].add(sample_id)
    verdicts: dict[tuple[str, str], Row] = {}  # of reference completions there are none
    for origin, ids in by_origin.items():
        number = origin.removeprefix("round-")
        if number.isdigit():
            for _, table in reader.verdicts(int(number), ["sample_id", "score", "reason"]):
                verdicts |= {(origin, row["sample_id"]): row for row in rows_with(table, "sample_id", ids)}
    items = {}
    for round_, ids in by_round.items():
        for table in reader.groups(round_, "rows", "rows.parquet", stored(reader, LEARNED)):
            rows = rows_with(table, "sample_id", ids)
            if reader.pictured:
                name_images(reader, rows, StageFile(round_, "rows", "rows.parquet"))
            for row in rows:
                verdict = verdicts.get((row["origin"], row["sample_id"]), {})
                reference = "a reference completion" if row["origin"] == "reference" else None
                items[round_, row["origin"], row["sample_id"]] = {
                    **{name: row[name] for name in ("origin", "source", "sample_id", "prompt_id")},
                    "round": round_,
                    "prompt": content(row.get("prompt")),
                    "completion": content(row.get("completion")),
                    "weight": finite(row["weight"]),
                    "score": finite(verdict.get("score")),
                    "reason": verdict.get("reason") or reference,
                }
    return [items[row] for row in chosen if row in items]


# -- rows and values --------------------------------------------------------------------------------------------------


def generated_rows(reader: RunReader, round_: int, stage: str, chunk: int, prompt_ids: Iterable[str]) -> list[Row]:
    """The chunk's samples of these prompts, token ids as their number; none where the file cannot be read.

    Of images the completion is {"image": hash}; the reader then knows where they are.
    """
    table = reader.chunk(round_, stage, chunk, stored(reader, GENERATED))
    if table is None:
        return []
    if "completion_ids" in table.column_names:
        tokens = pc.list_value_length(table.column("completion_ids"))
        table = table.drop_columns(["completion_ids"]).append_column("tokens", tokens)
    rows = rows_with(table, "prompt_id", prompt_ids)
    if reader.pictured:
        file = StageFile(round_, stage, chunk_file(chunk))
        names = reader.names(round_, stage, file.file)
        latents = ["latents"] if reader.config.get("policy", {}).get("family") == "diffusion" else []
        for name in ("completion", PICTURE, *latents):
            if names and name not in names:
                reader.note(f"round {round_}, {stage}", f"{file.file} has no column {name}")
        name_images(reader, rows, file)
    return rows


def stored(reader: RunReader, columns: Iterable[str]) -> list[str]:
    """The columns to read: of an image its name, in place of its bytes."""
    return [PICTURE if name == "completion" and reader.pictured else name for name in columns]


def name_images(reader: RunReader, rows: list[Row], file: StageFile) -> None:
    """Puts the name of its image into each row, as its completion."""
    for row in rows:
        name = row.get(PICTURE)
        row["completion"] = None
        if isinstance(name, str) and HASH.fullmatch(name):
            row["completion"] = {"image": name}
            reader.pictures.setdefault(name, file)
        elif name is not None:
            reader.note(f"round {file.round}, {file.stage}", f"{file.file} names an image by something else")


def rows_with(table: pa.Table, column: str, values: Iterable[str]) -> list[Row]:
    rows: list[Row] = table.filter(pc.is_in(table.column(column), pa.array(sorted(values), pa.string()))).to_pylist()
    return rows


def rows_by_sample(table: pa.Table | None, prompt_ids: Iterable[str]) -> dict[str, Row]:
    """The table's rows of these prompts by sample id; none of a table that could not be read."""
    return {} if table is None else {row["sample_id"]: row for row in rows_with(table, "prompt_id", prompt_ids)}


def content(value: Any, room: list[int] | None = None) -> Any:
    """A prompt or a completion to show: texts cut at LONGEST, also inside of messages; of a list with more than WHOLE
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
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def finite(value: Any) -> float | None:
    """The number to six decimals; None for what is none or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), 6)


def parts(score: Mapping[str, Any]) -> dict[str, float | None]:
    """What each reward said, by its name."""
    return {name[8:]: finite(value) for name, value in score.items() if name.startswith("rewards/")}


def sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is shown of every sample; why the policy made no completion of it, where it says so."""
    sample = {"id": row["sample_id"], "completion": content(row.get("completion"))}
    sample |= {"tokens": row.get("tokens"), "finish": row.get("finish")}
    return sample | ({"invalid": cut(str(row["invalid"]), DETAIL)} if row.get("invalid") is not None else {})


def images_of(samples: Iterable[Row]) -> list[str]:
    """The names of the images among the completions."""
    completions = (sample.get("completion") for sample in samples)
    return [
        completion["image"] for completion in completions if isinstance(completion, Mapping) and "image" in completion
    ]


def seed_of(row: Mapping[str, Any]) -> str | None:
    """The seed as text: a number of 63 bits is more than a browser's numbers hold."""
    return None if row.get("seed") is None else str(row["seed"])
