"""Scores files: completions, images or preferences."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from raftune.data.columns import COMPLETION, PROMPT, Form, find, has, read_answer, read_prompt
from raftune.data.feedback import read_preferences
from raftune.data.images import SUFFIXES, image_of, is_picture, sha256_of_png
from raftune.data.rows import SkippedRow, SkipReason, UnusableRow, reasons
from raftune.data.tables import raw_rows
from raftune.errors import DataError
from raftune.evaluation.bootstrap import interval, mean_by_prompt, numbers_by_key
from raftune.records import Row, Score, ScoreStatus
from raftune.rewards.batch import RESERVED, RewardBatch
from raftune.rewards.outcome import FAILED, excerpt
from raftune.rewards.reward_set import RewardSet
from raftune.sanitize import counted
from raftune.store.files import stage_file
from raftune.store.parquet import write_table

CHUNK = 256  # completions in one call of the reward set, which cuts them into calls of the rewards
OWN = ("row", "score", "status", "detail")
EXAMPLES = 3  # failures that are shown
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
IMAGE = ("image", "completion")  # columns that may hold an image, or the path of one
CAPTION = ("prompt", "caption", "text")
METADATA = "metadata.jsonl"  # as the folders of images that `datasets` reads have it
FILE_NAME = "file_name"
ImageSource = Path | bytes


@dataclass(frozen=True)
class CompletionFile:
    """What of a file is scored, an entry a completion; of preferences the chosen and the rejected one in turn.

    Images are read one by one when they are scored; `written` is what stands for each where rows are written.
    """

    rows: list[int]
    prompts: list[Any]
    completions: Sequence[Any]
    columns: dict[str, list[Any]]
    pairs: bool
    skipped: list[SkippedRow]
    words: tuple[str, ...]
    written: Sequence[Any] | None = None

    @property
    def media(self) -> str:
        return "text" if self.written is None else "image"


class ImageFiles(Sequence[Any]):
    """Images of files or bytes, each read when it is used."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: Any) -> Any:
        """The image, RGB. Raises DataError if it can no longer be read."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        source = self.sources[index]
        return image_of(source if isinstance(source, bytes) else source.read_bytes())


# -- reading ----------------------------------------------------------------------------------------------------------


def read_answers(source: str, split: str = "train", dialogues: Form = "text", field: str = "FILE") -> CompletionFile:
    """The completions, images or preferences of the source; rows that cannot be read are skipped and named.

    Raises DataError if none can be read.
    """
    path, images = Path(source).expanduser(), is_folder(source)
    if not images:
        first = next((row for _, row in islice(raw_rows(source, split, field), 100) if isinstance(row, dict)), {})
        images = holds_image(first)
        if not images and not has(first, COMPLETION):
            feedback = read_preferences(source, split, field=field, dialogues=dialogues)
            numbers = [pair.row for pair in feedback.rows for _ in (0, 1)]
            prompts = [pair.prompt for pair in feedback.rows for _ in (0, 1)]
            texts = [text for pair in feedback.rows for text in (pair.chosen, pair.rejected)]
            return CompletionFile(numbers, prompts, texts, {}, True, feedback.skipped, tuple(feedback.words()))
    read = partial(_read_image, base=path if path.is_dir() else path.parent) if images else _read_completion
    kept: list[tuple[int, Any, Any, Any, dict[str, Any]]] = []
    skipped: list[SkippedRow] = []
    for number, raw in folder_rows(path, field) if is_folder(source) else raw_rows(source, split, field):
        try:
            if isinstance(raw, dict):
                kept.append((number, *read(raw)))
            else:
                skipped.append(raw)
        except UnusableRow as error:
            skipped.append(SkippedRow(number, error.reason, error.detail))
    if not kept:
        why = "; ".join(reasons(skipped)) or "there are none"
        content = "images with prompts" if images else "prompts with completions, or preferences"
        detail = f" ({skipped[0].detail})" if skipped and images else ""
        raise DataError(f"{field} must hold {content}; all rows were skipped: {why}{detail}.")
    numbers, prompts, completions, names, others = (list(part) for part in zip(*kept, strict=True))
    columns = {
        name: [row.get(name) for row in others] for name in dict.fromkeys(name for row in others for name in row)
    }
    words = (
        f"{source}: {counted(len(kept), 'image' if images else 'completion')}",
        *(f"  {s}" for s in reasons(skipped)),
    )
    if images:
        return CompletionFile(numbers, prompts, ImageFiles(completions), columns, False, skipped, words, names)
    return CompletionFile(numbers, prompts, completions, columns, False, skipped, words)


def _read_completion(row: Row) -> tuple[Any, Any, None, Row]:
    """Prompt, completion and all other columns. An empty completion is valid. Raises UnusableRow."""
    column, value = find(row, PROMPT)
    prompt = read_prompt(value, column)
    name, answer = find(row, COMPLETION)
    try:
        completion = read_answer(answer, prompt, name)
    except UnusableRow as error:
        if error.reason is not SkipReason.EMPTY_ANSWER or not isinstance(answer, str):
            raise
        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    return prompt, completion, None, {key: value for key, value in row.items() if key not in (column, name)}


def _read_image(row: Row, base: Path) -> tuple[Any, ImageSource, str, Row]:
    """Prompt, source and name of the image, which is read once, and all other columns. Raises UnusableRow."""
    caption, prompt = find(row, CAPTION)
    if not isinstance(prompt, str | int | list):
        raise UnusableRow(
            SkipReason.WRONG_TYPE, f"{caption} must be a text or a class label; got {type(prompt).__name__}"
        )
    column = next((name for name in IMAGE if is_picture(row.get(name))), None)
    if column is None:
        raise UnusableRow(SkipReason.MISSING, f"there is no image in {', '.join(row)}")
    value = row[column]
    value = (value.get("bytes") or value["path"]) if isinstance(value, dict) else value
    source = value if isinstance(value, bytes) else base / Path(value).expanduser()
    try:
        _ = ImageFiles([source])[0]
    except (DataError, OSError) as error:
        raise UnusableRow(SkipReason.BROKEN, f"{column}: {error}") from None
    name = f"{sha256_of_png(source)}.png" if isinstance(source, bytes) else str(value)
    return prompt, source, name, {key: other for key, other in row.items() if key not in (caption, column)}


def is_folder(source: str) -> bool:
    """Whether the source is a folder of images."""
    path = Path(source).expanduser()
    return path.is_dir() and ((path / METADATA).is_file() or any(image_paths(path)))


def image_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def holds_image(row: Row) -> bool:
    """Whether a column of the row holds an image, or the path of one."""
    return any(is_picture(row.get(name)) for name in IMAGE)


def folder_rows(folder: Path, field: str) -> Iterator[tuple[int, Row | SkippedRow]]:
    """A row an image: of metadata.jsonl (file_name and other columns), else each image with the text file beside it.

    Raises DataError if there is neither.
    """
    if not (folder / METADATA).is_file():
        paths = image_paths(folder)
        texts = [path.with_suffix(".txt") for path in paths]
        if not any(text.is_file() for text in texts):
            raise DataError(
                f"{field}: {folder} holds images and no prompts. Add {METADATA} with a line for each, "
                '{"file_name": "a.png", "prompt": "a red disc"}, or a text file of the same name beside each image.'
            )
        for number, (path, text) in enumerate(zip(paths, texts, strict=True), 1):
            prompt = {"prompt": text.read_text(encoding="utf-8").strip()} if text.is_file() else {}
            yield number, {"image": path.name, **prompt}
        return
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            yield number, SkippedRow(number, SkipReason.BROKEN, f"not valid JSON: {error}")
            continue
        if isinstance(row, dict) and FILE_NAME in row:
            yield number, {"image": row.pop(FILE_NAME), **row}
        elif line.strip():
            yield number, SkippedRow(number, SkipReason.MISSING, f"there is no {FILE_NAME}")


# -- scoring ----------------------------------------------------------------------------------------------------------


def score_answers(
    rewards: RewardSet, answers: CompletionFile, observe: Callable[[int, int], None] = lambda done, of: None
) -> list[Score]:
    """A score for each completion, in the order of the file. A failure is a status, and raises nothing."""
    scores: list[Score] = []
    columns = {name: values for name, values in answers.columns.items() if name not in RESERVED}
    batch = RewardBatch(answers.prompts, cast("list[Any]", answers.completions), columns)
    for start in range(0, len(batch), CHUNK):
        scores += rewards.score(batch.take(range(start, min(start + CHUNK, len(batch)))))
        observe(len(scores), len(batch))
    return scores


def failures(answers: CompletionFile, scores: Sequence[Score]) -> dict[str, tuple[str, str, str]]:
    """By detail, the status, prompt and completion of the first sample that failed with it; three at most."""
    examples: dict[str, tuple[str, str, str]] = {}
    for i, score in enumerate(scores):
        detail = detail_of(score)
        if score.status in FAILED and detail not in examples and len(examples) < EXAMPLES:
            examples[detail] = (score.status.value, excerpt(answers.prompts[i]), excerpt(answers.completions[i]))
    return examples


def detail_of(*scores: Score) -> str:
    return "; ".join(part.detail for score in scores for part in score.parts.values() if part.detail)


def summary(answers: CompletionFile, scores: Sequence[Score]) -> dict[str, Any]:
    """Counts by status, mean with its interval over prompts, spread; of preferences how often the preferred wins."""
    values = np.array([math.nan if score.value is None else score.value for score in scores], dtype=np.float64)
    prompts = numbers_by_key(pa.array([json.dumps(prompt, sort_keys=True) for prompt in answers.prompts]))
    finite = values[np.isfinite(values)]
    facts: dict[str, Any] = {
        "answers": len(values),
        "skipped": len(answers.skipped),
        "statuses": dict(Counter(score.status.value for score in scores)),
        "score": interval(mean_by_prompt(prompts, values)),
        "std": float(finite.std()) if len(finite) else None,
        "quantiles": {f"{q:g}": float(np.quantile(finite, q)) for q in QUANTILES} if len(finite) else {},
    }
    if answers.pairs:
        margins = values[::2] - values[1::2]
        right = np.where(np.isfinite(margins), (np.sign(margins) + 1) / 2, np.nan)
        facts["accuracy"] = interval(mean_by_prompt(prompts[::2], right))
        facts["pairs"] = int(np.isfinite(margins).sum())
    return facts


def write_scored(answers: CompletionFile, scores: Sequence[Score], out: Path) -> None:
    """Writes a row a completion, or a row a pair, as Parquet or JSON lines, by the suffix."""
    rows = list((pair_rows if answers.pairs else answer_rows)(answers, scores))

    def as_json(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, default=str)

    def column(values: list[Any]) -> pa.Array:
        """The values as Arrow infers them; as JSON if it cannot."""
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            return pa.array([as_json(value) for value in values], pa.string())

    with stage_file(out.parent, out) as path:
        if out.suffix == ".parquet":
            write_table(pa.table({name: column([row[name] for row in rows]) for name in rows[0]}), path)
        else:
            path.write_text("".join(f"{as_json(row)}\n" for row in rows), encoding="utf-8")


def answer_rows(answers: CompletionFile, scores: Sequence[Score]) -> Iterator[dict[str, Any]]:
    """The row as it was read and its score; a column of the file that has such a name is kept as `given_NAME`."""
    names = {name: f"given_{name}" if name in OWN else name for name in answers.columns}
    written = answers.completions if answers.written is None else answers.written
    for i, score in enumerate(scores):
        others = {names[name]: values[i] for name, values in answers.columns.items()}
        sample = {"row": answers.rows[i], "prompt": answers.prompts[i], "completion": written[i]}
        yield {**sample, **others, "score": score.value, "status": score.status.value, "detail": detail_of(score)}


def pair_rows(answers: CompletionFile, scores: Sequence[Score]) -> Iterator[dict[str, Any]]:
    """Both completions with their scores; `margin` is by how much the preferred one is ahead."""
    for i in range(0, len(scores), 2):
        chosen, rejected = scores[i : i + 2]
        margin = None if chosen.value is None or rejected.value is None else chosen.value - rejected.value
        status = ScoreStatus.NOT_APPLICABLE if margin is None else ScoreStatus.OK
        status = next((score.status for score in (chosen, rejected) if score.status in FAILED), status)
        yield {
            "row": answers.rows[i],
            "prompt": answers.prompts[i],
            "chosen": answers.completions[i],
            "rejected": answers.completions[i + 1],
            "score_chosen": chosen.value,
            "score_rejected": rejected.value,
            "margin": margin,
            "status": status.value,
            "detail": detail_of(chosen, rejected),
        }
