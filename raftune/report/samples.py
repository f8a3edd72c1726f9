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
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from raftune.records import Row
from raftune.report.pictures import PICTURE, ImageSet
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
UNREADABLE = "(not readable: the round's plan is damaged)"
# What could end the element that the document stands in, what JavaScript takes for line ends, and half characters,
# which no file can hold. JSON allows each of them as an escape.
_RISKY = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
PROMPTS_BY = (
    "alarms that name their samples, then in turn the largest margins, prompts that yielded nothing, and a random "
    "choice by hash, spread over the rounds"
)
ANSWERS_BY = (
    "alarms that name their samples, then in turn the largest gains and the largest losses from the start to the best "
    "round, and a random choice by hash"
)
ROWS_BY = "alarms that name their samples, then a random choice by hash, spread over the rounds"
Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


# -- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """The samples of one prompt in one round: how many, how far the best is above their mean, and whether any is kept.

    `number` is the prompt's place in its chunk; `margin` is None where nothing could be scored.
    """

    round: int
    chunk: int
    number: int
    prompt_id: str
    samples: int
    margin: float | None
    without_candidates: bool


@dataclass(frozen=True, slots=True)
class HeldOutPair:
    """One held-out prompt and sample, in all rounds; `gain` is the best round's score less the start's, if both
    exist."""

    chunk: int
    prompt_id: str
    k: int
    gain: float | None


def order_groups(groups: Sequence[PromptGroup], most: int) -> list[PromptGroup]:
    """The most instructive prompts of a round first: largest margins, those that yielded nothing, and by hash, in turn.

    A prompt's id is a hash: the smallest ids are a random choice, and the same one in every round.
    """
    by_margin = sorted((g for g in groups if g.margin is not None), key=lambda g: -(g.margin or 0.0))
    without_candidates = sorted((g for g in groups if g.without_candidates), key=lambda g: g.prompt_id)
    by_hash = sorted(groups, key=lambda g: g.prompt_id)
    return first(in_turn(by_margin, without_candidates, by_hash), most, lambda g: g.prompt_id)


def order_pairs(pairs: Sequence[HeldOutPair], most: int) -> list[HeldOutPair]:
    """The most instructive held-out samples first: largest gains, largest losses, and by hash, in turn."""
    known = sorted((p for p in pairs if p.gain is not None), key=lambda p: -(p.gain or 0.0))
    by_hash = sorted(pairs, key=lambda p: (p.k, p.prompt_id))
    return first(in_turn(known, known[::-1], by_hash), most, lambda p: (p.prompt_id, p.k))


def in_turn(*lists: Iterable[Item]) -> Iterator[Item]:
    """The first of each list, then the second of each, and so on."""
    boxed = (([item] for item in items) for items in lists)
    for turn in zip_longest(*boxed, fillvalue=[]):
        yield from chain.from_iterable(turn)


def first(items: Iterable[Item], most: int, key: Callable[[Item], Key]) -> list[Item]:
    """The first `most` items of different keys."""
    chosen: dict[Key, Item] = {}
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


def encoded_size(item: Any) -> int:
    """The bytes that the item takes in the page, with what is escaped there: six for each `<` of an answer of code."""
    return len(embedded(item).encode())


def embedded(document: Any) -> str:
    """The document, or a part of it, as JSON in which no character can end its element."""
    content = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _RISKY.sub(lambda match: f"\\u{ord(match[0]):04x}", content)


# -- the candidates of every round ------------------------------------------------------------------------------------


def prompts(reader: RunReader, named: set[str], images: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: prompts by round, in the order of the plan, with all candidates: score, verdict
    and reason. Samples that are named are always among them."""
    wanted = {(int(s.split("/")[0]), s.split("/")[1]) for s in named if s.split("/")[0].isdigit() and s.count("/") > 1}
    total, must, rounds = 0, [], []
    for round_ in reader.rounds("generate"):
        groups = list(groups_of(reader, round_))
        total += len(groups)
        must += [g for g in groups if (g.round, g.prompt_id) in wanted]
        rounds.append(order_groups(groups, MOST_PROMPTS))
    chosen = first(chain(must, in_turn(*rounds)), MOST_PROMPTS, lambda g: (g.round, g.prompt_id))
    chosen = up_to(chosen, MOST_SAMPLES, lambda g: g.samples)
    place = {(g.round, g.prompt_id): (g.round, g.chunk, g.number) for g in chosen}
    items = up_to(prompt_items(reader, chosen), PROMPT_BYTES, encoded_size)
    items = images.up_to(items, PROMPT_PICTURES, lambda item: images_of(item["samples"]))
    items.sort(key=lambda item: place[item["round"], item["id"]])
    return {"shown": len(items), "of": total, "chosen_by": PROMPTS_BY, "items": items}


def groups_of(reader: RunReader, round_: int) -> Iterator[PromptGroup]:
    """Every prompt of the round that can be shown, from its verdicts or, where there are none, from its scores."""
    generated = set(reader.chunks(round_, "generate"))
    selected: set[int] = set()
    for chunk, table in reader.verdicts(round_, ["prompt_id", "score", "weight"]):
        selected.add(chunk)
        if chunk in generated:
            yield from chunk_groups(table, round_, chunk)
    for chunk in sorted(generated - selected):
        table = reader.chunk(round_, "score", chunk, ["prompt_id", "score"])
        if table is None:
            table = reader.chunk(round_, "generate", chunk, ["prompt_id"])
        if table is not None:
            yield from chunk_groups(table, round_, chunk)


def chunk_groups(table: pa.Table, round_: int, chunk: int) -> Iterator[PromptGroup]:
    """The chunk's prompts, in order; without weights, each counts as kept."""
    names, none = table.column_names, pa.nulls(len(table), pa.float64())
    scores = table.column("score") if "score" in names else none
    finite_scores = pc.if_else(pc.is_finite(scores), scores, pa.scalar(None, pa.float64()))
    kept = pc.greater(table.column("weight"), 0) if "weight" in names else pa.repeat(pa.scalar(True), len(table))
    columns = pa.table({"id": table.column("prompt_id"), "score": finite_scores, "kept": kept})
    aggregates = [("id", "count"), ("score", "max"), ("score", "mean"), ("kept", "any")]
    prompts = columns.group_by("id", use_threads=False).aggregate(aggregates)
    for number, row in enumerate(prompts.to_pylist()):
        best, mean = row["score_max"], row["score_mean"]
        margin = None if best is None or mean is None else best - mean
        yield PromptGroup(round_, chunk, number, row["id"], row["id_count"], margin, not row["kept_any"])


def prompt_items(reader: RunReader, chosen: list[PromptGroup]) -> list[dict[str, Any]]:
    """The items of the groups that can be read, in the order of the groups."""
    by_chunk: defaultdict[tuple[int, int], list[PromptGroup]] = defaultdict(list)
    for group in chosen:
        by_chunk[group.round, group.chunk].append(group)
    items: dict[tuple[int, str], dict[str, Any]] = {}
    for round_ in sorted({group.round for group in chosen}):
        chunks = {chunk for r, chunk in by_chunk if r == round_}
        texts = reader.prompts(round_, "plan", chunks)
        prompt_ids = {group.prompt_id for group in chosen if group.round == round_}
        verdicts: dict[str, Row] = {}
        for _, table in reader.verdicts(round_, VERDICT):
            verdicts |= rows_by_sample(table, prompt_ids)
        reasons = reader.json(round_, "select", "summary.json").get("barren")
        reasons = reasons if isinstance(reasons, Mapping) else {}
        for chunk in sorted(chunks):
            groups = by_chunk[round_, chunk]
            samples = candidates(reader, round_, chunk, {group.prompt_id for group in groups}, verdicts)
            for group in groups:
                if group.prompt_id in samples:
                    reason = reasons.get(group.prompt_id)
                    items[round_, group.prompt_id] = {
                        "round": round_,
                        "id": group.prompt_id,
                        "prompt": content(texts.get(group.prompt_id, UNREADABLE)),
                        "margin": finite(group.margin),
                        "reason": None if reason is None else str(reason),
                        "samples": samples[group.prompt_id],
                    }
    return [items[g.round, g.prompt_id] for g in chosen if (g.round, g.prompt_id) in items]


def candidates(
    reader: RunReader, round_: int, chunk: int, prompt_ids: set[str], verdicts: Mapping[str, Row]
) -> dict[str, list[dict[str, Any]]]:
    """The candidates of each of these prompts: the policy's samples, then other sources'. What is not known is null;
    where the scores are lost, the verdict still holds the score."""
    scores = rows_by_sample(reader.chunk(round_, "score", chunk), prompt_ids)
    samples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in chain(*(generated_rows(reader, round_, stage, chunk, prompt_ids) for stage in ("generate", "teach"))):
        score, verdict = scores.get(row["sample_id"], {}), verdicts.get(row["sample_id"], {})
        sample = {
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
        samples[row["prompt_id"]].append(sample)
    return samples


# -- held-out samples over the rounds ---------------------------------------------------------------------------------


def compared(reader: RunReader, named: set[str], best: int, images: ImageSet) -> dict[str, Any]:
    """{shown, of, chosen_by, items}: held-out samples of one prompt and seed in every round, by prompt and k; samples
    that are named are always among them.

    Of images also `rounds`, those of which they are shown, and `of_rounds`, how many there are.
    """
    rounds = reader.rounds("evaluate/generate")
    pairs = list(pairs_of(reader, rounds, best))
    wanted = set()
    for sample_id in named:  # such as 0003e/1f2e-0/002: round 3's held-out sample of prompt 1f2e-0 with k = 2
        scope, _, rest = sample_id.partition("/")
        prompt_id, _, k = rest.rpartition("/")
        if scope.endswith("e") and k.isdigit():
            wanted.add((scope, prompt_id, int(k)))
    must = [pair for pair in pairs if (pair.prompt_id, pair.k) in {key[1:] for key in wanted}]
    most = max(1, MOST_ANSWERS // max(1, len(rounds)))
    chosen = first(chain(must, order_pairs(pairs, most)), most, lambda p: (p.prompt_id, p.k))
    items = up_to(pair_items(reader, rounds, chosen), ANSWER_BYTES, encoded_size)
    seen = rounds_seen(rounds, best, {int(scope[:4]) for scope, _, _ in wanted if scope[:4].isdigit()})
    items = images.up_to(
        items,
        ANSWER_PICTURES,
        lambda item: images_of(item["answers"][str(r)] for r in seen if str(r) in item["answers"]),
    )
    place = {(pair.prompt_id, pair.k): number for number, pair in enumerate(pairs)}
    items.sort(key=lambda item: place[item["prompt_id"], item["k"]])
    shown = {"rounds": seen, "of_rounds": len(rounds)} if reader.pictured else {}
    return {"shown": len(items), "of": len(pairs), "chosen_by": ANSWERS_BY, "items": items, **shown}


def rounds_seen(rounds: list[int], best: int, named: set[int]) -> list[int]:
    """The rounds of which images are shown: the start, the best, the last, those of alarms, and others evenly."""
    if len(rounds) <= MOST_ROUNDS:
        return rounds
    must = [r for r in rounds if r in {rounds[0], best, rounds[-1]}]
    evenly = [rounds[round(i * (len(rounds) - 1) / (MOST_ROUNDS - 1))] for i in range(MOST_ROUNDS)]
    return sorted(first(chain(must, sorted(named & set(rounds)), evenly), MOST_ROUNDS, lambda r: r))


def pairs_of(reader: RunReader, rounds: list[int], best: int) -> Iterator[HeldOutPair]:
    """Every held-out sample, as the first round with evaluations has them."""
    if not rounds:
        return
    start, end = rounds[0], best if best in rounds else rounds[-1]
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
    wanted = {(pair.prompt_id, pair.k) for pair in chosen}
    answers: defaultdict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    seeds: dict[tuple[str, int], str | None] = {}
    texts: dict[str, Any] = {}
    for round_ in rounds:
        texts = texts or reader.prompts(round_, "evaluate/plan", set(chunks))
        for chunk, prompt_ids in sorted(chunks.items()):
            scores = rows_by_sample(reader.chunk(round_, "evaluate/score", chunk), prompt_ids)
            judged = rows_by_sample(reader.chunk(round_, "evaluate/judge", chunk), prompt_ids)
            for row in generated_rows(reader, round_, "evaluate/generate", chunk, prompt_ids):
                key = (row["prompt_id"], row["k"])
                if key not in wanted:
                    continue
                score, verdict = scores.get(row["sample_id"], {}), judged.get(row["sample_id"], {})
                seeds.setdefault(key, seed_of(row))
                answers[key][str(round_)] = {
                    "id": row["sample_id"],
                    "completion": content(row.get("completion")),
                    "score": finite(score.get("score")),
                    "held_out": finite(verdict.get("score")),
                    "parts": {**parts(score), **parts(verdict), **parts(score)},
                    "tokens": row.get("tokens"),
                    "finish": row.get("finish"),
                    **invalid(row),
                }
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
    items = up_to(row_items(reader, chosen), ROW_BYTES, encoded_size)
    items = images.up_to(items, ROW_PICTURES, lambda item: images_of([item]))
    items.sort(key=lambda item: item["round"])
    return {"shown": len(items), "of": total, "chosen_by": ROWS_BY, "items": items}


def row_items(reader: RunReader, chosen: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """The items, in the order in which they were chosen."""
    by_round: defaultdict[int, set[str]] = defaultdict(set)
    by_origin: defaultdict[str, set[str]] = defaultdict(set)
    for round_, origin, sample_id in chosen:
        by_round[round_].add(sample_id)
        by_origin[origin].add(sample_id)
    verdicts: dict[tuple[str, str], Row] = {}  # of reference answers there are none
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
                reference = "a reference answer" if row["origin"] == "reference" else None
                items[round_, row["origin"], row["sample_id"]] = {
                    "round": round_,
                    "origin": row["origin"],
                    "source": row["source"],
                    "sample_id": row["sample_id"],
                    "prompt_id": row["prompt_id"],
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

    Of images the completion is {"image": hash}; the reader then knows where they lie.
    """
    table = reader.chunk(round_, stage, chunk, stored(reader, GENERATED))
    if table is None:
        return []
    if "completion_ids" in table.column_names:
        tokens = pc.list_value_length(table.column("completion_ids"))
        table = table.drop_columns(["completion_ids"]).append_column("tokens", tokens)
    rows = rows_with(table, "prompt_id", prompt_ids)
    if reader.pictured:
        place = StageFile(round_, stage, chunk_file(chunk))
        names = reader.names(round_, stage, place.file)
        latents = ["latents"] if reader.config.get("policy", {}).get("family") == "diffusion" else []
        for name in ("completion", PICTURE, *latents):
            if names and name not in names:
                reader.note(f"round {round_}, {stage}", f"{place.file} has no column {name}")
        name_images(reader, rows, place)
    return rows


def stored(reader: RunReader, columns: Iterable[str]) -> list[str]:
    """The columns to read: of an image its name, in place of its bytes."""
    return [PICTURE if name == "completion" and reader.pictured else name for name in columns]


def name_images(reader: RunReader, rows: list[Row], place: StageFile) -> None:
    """Puts the name of its image into each row, as its completion."""
    for row in rows:
        name = row.get(PICTURE)
        row["completion"] = None
        if isinstance(name, str) and HASH.fullmatch(name):
            row["completion"] = {"image": name}
            reader.pictures.setdefault(name, place)
        elif name is not None:
            reader.note(f"round {place.round}, {place.stage}", f"{place.file} names an image by something else")


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


def invalid(row: Mapping[str, Any]) -> dict[str, str]:
    """Why the policy made no completion of this sample, where it says so."""
    return {"invalid": cut(str(row["invalid"]), DETAIL)} if row.get("invalid") is not None else {}


def images_of(samples: Iterable[Row]) -> list[str]:
    """The names of the images among the completions."""
    completions = (sample.get("completion") for sample in samples)
    return [
        completion["image"] for completion in completions if isinstance(completion, Mapping) and "image" in completion
    ]


def seed_of(row: Mapping[str, Any]) -> str | None:
    """The seed as text: a number of 63 bits is more than a browser's numbers hold."""
    return None if row.get("seed") is None else str(row["seed"])
