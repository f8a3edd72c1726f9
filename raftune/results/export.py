"""Exports samples as data sets for TRL: SFT, preferences and unpaired preferences.

Images are written as {bytes, path}, the image type of `datasets`.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raftune.errors import ConfigError
from raftune.policies.registry import FAMILIES, family_of, load_policy
from raftune.records import TOOLS, JsonType, Prompt, Row
from raftune.results import samples
from raftune.starters.resolve import resolve_starters
from raftune.store.files import explaining, stage_file
from raftune.store.run import RunFolder

NESTED = ("prompt", TOOLS)
IGNORED = -100  # what transformers' losses leave out
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def sft(group: Sequence[Row]) -> Iterator[Row]:
    """prompt, completion, weight: the samples that were kept, as often as a rule's weights say."""
    for sample in group:
        if sample["weight"] > 0:
            yield {**as_pair(sample), "weight": sample["weight"]}


def preference(group: Sequence[Row]) -> Iterator[Row]:
    """prompt, chosen, rejected, margin: the prompt's best sample against its worst, where they differ in score."""
    scored = sorted(samples.usable(list(group)), key=lambda s: (s["score"], -s["k"]))
    if scored and scored[-1]["score"] > scored[0]["score"]:
        best = as_pair(scored[-1])
        yield {
            "prompt": best["prompt"],
            "chosen": best["completion"],
            "rejected": as_pair(scored[0])["completion"],
            "margin": scored[-1]["score"] - scored[0]["score"],
            **{name: value for name, value in best.items() if name == TOOLS},
        }


def unpaired(group: Sequence[Row]) -> Iterator[Row]:
    """prompt, completion, label: every scored sample, true where it was kept."""
    for sample in samples.usable(list(group)):
        yield {**as_pair(sample), "label": sample["weight"] > 0}


def sft_tokens(run: RunFolder, allow_code: bool) -> Callable[[Sequence[Row]], Iterator[Row]]:
    """input_ids, labels: the kept samples on the exact ids that were generated, the prompt masked, as SFTTrainer
    reads.

    Needs the run's tokenizer. Raises ConfigError where to load it would import code that the configuration names, and
    for a family without tokens.
    """
    config = run.configuration()
    built_in = config.policy.family in FAMILIES
    if not allow_code and (not built_in or getattr(config.policy, "trust_remote_code", False)):
        model = getattr(config.policy, "model", "its model")
        code = f"policy.trust_remote_code of {model}" if built_in else f"policy.family: {config.policy.family}"
        raise ConfigError(
            f"--format sft-tokens would import code that the run's configuration names ({code}). If you trust this "
            "run, add --allow-code; --format sft needs no code."
        )
    config = resolve_starters(config)
    family, start = family_of(config), run.folder(0, "model")
    encoder = None
    if "completion_ids" in family.payload.names:
        encoder = getattr(load_policy(family, config, start, start), "encoder", None)
    if encoder is None:
        raise ConfigError(f"--format sft-tokens needs a family with tokens; got {config.policy.family}. Write sft.")

    def rows(group: Sequence[Row]) -> Iterator[Row]:
        kept = [sample for sample in group if sample["weight"] > 0]
        if kept:
            prompt = Prompt(kept[0]["prompt_id"], kept[0]["prompt"], {TOOLS: kept[0].get(TOOLS)})
            [prompt_ids] = encoder.encode([prompt], for_drawing=False)
            for sample in kept:
                ids = list(sample["completion_ids"])
                yield {"input_ids": prompt_ids + ids, "labels": [IGNORED] * len(prompt_ids) + ids}

    return rows


FORMATS: dict[str, Callable[[Sequence[Row]], Iterator[Row]]] = {
    "sft": sft,
    "preference": preference,
    "unpaired": unpaired,
}


def as_pair(sample: Row) -> Row:
    """Prompt and completion in TRL's two shapes, texts or lists of messages; an image as `datasets` has it."""
    prompt, completion = sample["prompt"], sample["completion"]
    if isinstance(completion, bytes):
        return {"prompt": prompt, "completion": {"bytes": completion, "path": None}}
    if not isinstance(prompt, list):
        return {"prompt": prompt, "completion": completion}
    tools = {TOOLS: sample[TOOLS]} if TOOLS in sample else {}
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}], **tools}


def export(root: str | Path, kind: str, out: str | Path, which: str = "all", *, allow_code: bool = False) -> int:
    """Writes the rows of this format and returns their number; rounds are `all`, `best` or a number.

    `allow_code`: import code that the run's configuration names, where the format needs it.

    `out` ends in .jsonl or .parquet, or is a folder, which `datasets.load_from_disk` reads. Raises ConfigError where it
    exists, where the format is unknown, and where there is nothing to write.
    """
    run, out = RunFolder(root), Path(out)
    run.read_config()
    if out.exists():
        raise ConfigError(f"--out must not exist yet; {out} does. Choose another name.")
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out must end in .jsonl or .parquet, or be a folder; got {out.name!r}. Rename it.")
    rounds = samples.choose_rounds(run, which)
    shape = sft_tokens(run, allow_code) if kind == "sft-tokens" else FORMATS[kind]
    chunks = (chunk for round_ in rounds for chunk in samples.training_chunks(run, round_))
    written = ([row for group in samples.by_prompt(chunk) for row in shape(group)] for chunk in chunks)
    tables: Iterator[list[Row]] = filter(None, written)
    if (first := next(tables, None)) is None:
        raise ConfigError(f"--format {kind}: no row of round {which} fits; nothing was written. Choose another round.")
    if out.suffix == ".jsonl" and image_columns(first[0]):
        raise ConfigError(
            f"--out must end in .parquet or be a folder for a run of images; got {out.name!r}. JSON holds no bytes: "
            "rename it."
        )
    tables = itertools.chain([first], tables)
    if out.suffix != ".jsonl" and has_nested_prompts(run):
        tables = (list(map(with_json, rows)) for rows in tables)
    with explaining(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.suffix:
            return write_folder(tables, out)
        with stage_file(out.parent, out) as part:
            return WRITERS[out.suffix](tables, part)


def write_jsonl(tables: Iterator[list[Row]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for rows in tables:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            count += len(rows)
    return count


def image_columns(row: Row) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, dict) and "bytes" in value]


def has_nested_prompts(run: RunFolder) -> bool:
    """Whether the run's prompts or tools are such that Arrow's own structs would give them each other's keys."""
    with pq.ParquetFile(run.folder(0, "data") / "train.parquet") as file:
        return any(field.type == JsonType() for field in file.schema_arrow if field.name in NESTED)


def with_json(row: Row) -> Row:
    """The row with its prompt and tools as JSON, which `datasets` reads as the values that they are."""
    return row | {name: JsonTextType(json.dumps(row[name], ensure_ascii=False)) for name in NESTED if name in row}


class JsonTextType(str):
    """A text of JSON, for a column of Arrow's JSON type."""

    __slots__ = ()


def schema_of(rows: list[Row]) -> pa.Schema:
    """The columns of such rows; those of images are marked as `datasets` marks them."""
    schema, names = pa.Table.from_pylist(rows).schema, image_columns(rows[0])
    for name in [name for name, value in rows[0].items() if isinstance(value, JsonTextType)]:
        schema = schema.set(schema.get_field_index(name), pa.field(name, pa.json_()))
    for name in names:
        schema = schema.set(schema.get_field_index(name), pa.field(name, PICTURE))
    if not names:
        return schema
    features = {name: {"_type": "Image"} for name in names}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(tables: Iterator[list[Row]], path: Path) -> int:
    first, count = next(tables), 0
    schema = schema_of(first)
    with pq.ParquetWriter(path, schema) as writer:
        for rows in itertools.chain([first], tables):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def write_folder(tables: Iterator[list[Row]], folder: Path) -> int:
    import datasets

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.parquet"
        count = write_parquet(tables, path)
        datasets.disable_progress_bars()
        datasets.Dataset.from_parquet(str(path), cache_dir=scratch).save_to_disk(str(folder))
    return count


WRITERS: dict[str, Callable[[Iterator[list[Row]], Path], int]] = {
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
    "": write_folder,
}
