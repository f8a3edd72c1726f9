"""Scores files: completions, images or preferences."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from raftune.arrays import FloatArray
from raftune.data.columns import COMPLETION, PROMPT, find, has, read_answer, read_prompt
from raftune.data.preferences import Form, read_preferences
from raftune.data.rows import SkippedRow, SkipReason, UnusableRow, reasons
from raftune.data.source import raw_rows
from raftune.errors import DataError
from raftune.evaluation.bootstrap import interval, mean_by_prompt, numbers_by_key
from raftune.records import Score, ScoreStatus
from raftune.rewards.batch import RESERVED, RewardBatch
from raftune.rewards.failures import FAILED, FailureTally
from raftune.rewards.panel import RewardSet
from raftune.rewards.picture_files import ImageFiles, ImageSource, folder_rows, holds_picture, is_folder, one_picture
from raftune.sanitize import counted
from raftune.store.files import stage_file
from raftune.store.parquet import write_table

CHUNK = 256  # answers in one call of the panel, which cuts them into calls of the reward
OWN = ("row", "score", "status", "detail")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class CompletionFile:
    """What of a file is scored, an entry an answer; of preferences the preferred answer and the other, in turn.

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


@dataclass(frozen=True)
class FileScores:
    """The scores of a file's answers, and what failed."""

    answers: CompletionFile
    scores: list[Score]
    failures: FailureTally

    @property
    def values(self) -> FloatArray:
        """(N,) scores; NaN where there is none."""
        return np.array([math.nan if s.value is None else s.value for s in self.scores], dtype=np.float64)


def read_answers(source: str, split: str = "train", dialogues: Form = "text", field: str = "FILE") -> CompletionFile:
    """The answers of the source; rows that cannot be read are skipped and named. Raises DataError where none can."""
    if is_folder(source):
        return read_pictures(source, folder_rows(source, field), field)
    first = next((row for _, row in islice(raw_rows(source, split, field), 100) if isinstance(row, dict)), {})
    if holds_picture(first):
        return read_pictures(source, raw_rows(source, split, field), field)
    if not has(first, COMPLETION):
        return read_pairs(source, split, dialogues, field)
    kept: list[tuple[int, Any, Any, dict[str, Any]]] = []
    skipped: list[SkippedRow] = []
    for number, raw in raw_rows(source, split, field):
        try:
            kept.append((number, *one_answer(raw))) if isinstance(raw, dict) else skipped.append(raw)
        except UnusableRow as why:
            skipped.append(SkippedRow(number, why.reason, why.detail))
    if not kept:
        told = "; ".join(reasons(skipped))
        raise DataError(f"{field} must hold prompts with completions, or preferences; all rows were skipped: {told}.")
    numbers, prompts, completions, others = (list(part) for part in zip(*kept, strict=True))
    words = (f"{source}: {counted(len(kept), 'answer')}", *(f"  {line}" for line in reasons(skipped)))
    return CompletionFile(numbers, prompts, completions, side_by_side(others), False, skipped, words)


def read_pictures(source: str, rows: Iterable[tuple[int, dict[str, Any] | SkippedRow]], field: str) -> CompletionFile:
    """The images of the rows with their prompts, each looked at once. Raises DataError where none can be read."""
    path = Path(source).expanduser()
    base = path if path.is_dir() else path.parent
    kept: list[tuple[int, Any, ImageSource, str, dict[str, Any]]] = []
    skipped: list[SkippedRow] = []
    for number, raw in rows:
        try:
            kept.append((number, *one_picture(raw, base))) if isinstance(raw, dict) else skipped.append(raw)
        except UnusableRow as why:
            skipped.append(SkippedRow(number, why.reason, why.detail))
    if not kept:
        told = "; ".join(reasons(skipped)) or "there are none"
        first = f" ({skipped[0].detail})" if skipped else ""
        raise DataError(f"{field} must hold images with prompts; all rows were skipped: {told}{first}.")
    numbers, prompts, places, names, others = (list(part) for part in zip(*kept, strict=True))
    words = (f"{source}: {counted(len(kept), 'image')}", *(f"  {line}" for line in reasons(skipped)))
    return CompletionFile(
        numbers, prompts, ImageFiles(places, names), side_by_side(others), False, skipped, words, written=names
    )


def side_by_side(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The columns of the rows; None where a row lacks one."""
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def read_pairs(source: str, split: str, dialogues: Form, field: str) -> CompletionFile:
    found = read_preferences(source, split, field=field, dialogues=dialogues)
    numbers = [pair.row for pair in found.rows for _ in (0, 1)]
    prompts = [pair.prompt for pair in found.rows for _ in (0, 1)]
    completions = [answer for pair in found.rows for answer in (pair.chosen, pair.rejected)]
    return CompletionFile(numbers, prompts, completions, {}, True, found.skipped, tuple(found.words()))


def one_answer(row: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Prompt, completion and all other columns. An empty answer is one. Raises Unusable."""
    column, value = find(row, PROMPT)
    prompt = read_prompt(value, column)
    name, answer = find(row, COMPLETION)
    try:
        completion = read_answer(answer, prompt, name)
    except UnusableRow as why:
        if why.reason is not SkipReason.EMPTY_ANSWER or not isinstance(answer, str):
            raise
        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
    return prompt, completion, {key: value for key, value in row.items() if key not in (column, name)}


def score_answers(
    panel: RewardSet, answers: CompletionFile, observe: Callable[[int, int], None] = lambda done, of: None
) -> FileScores:
    """Every answer scored, in the order of the file; what fails is counted, and raises nothing."""
    scores: list[Score] = []
    failures = FailureTally()
    columns = {name: values for name, values in answers.columns.items() if name not in RESERVED}
    batch = RewardBatch(answers.prompts, cast("list[Any]", answers.completions), columns)
    for start in range(0, len(batch), CHUNK):
        part = batch.take(range(start, min(start + CHUNK, len(batch))))
        found = panel.score(part)
        for one, prompt, completion in zip(found, part.prompts, part.completions, strict=True):
            failures.add(one.status, detail_of(one), prompt, completion)
        scores += found
        observe(len(scores), len(batch))
    return FileScores(answers, scores, failures)


def detail_of(score: Score) -> str:
    return "; ".join(part.detail for part in score.parts.values() if part.detail)


def summary(scored: FileScores) -> dict[str, Any]:
    """Counts by status, mean with its interval over prompts, spread; of preferences how often the preferred wins."""
    values = scored.values
    prompts = numbers_by_key(pa.array([json.dumps(prompt, sort_keys=True) for prompt in scored.answers.prompts]))
    finite = values[np.isfinite(values)]
    found: dict[str, Any] = {
        "answers": len(values),
        "skipped": len(scored.answers.skipped),
        "statuses": dict(Counter(score.status.value for score in scored.scores)),
        "score": interval(mean_by_prompt(prompts, values)),
        "std": float(finite.std()) if len(finite) else None,
        "quantiles": {f"{q:g}": float(np.quantile(finite, q)) for q in QUANTILES} if len(finite) else {},
    }
    if scored.answers.pairs:
        margins = values[::2] - values[1::2]
        right = np.where(np.isfinite(margins), (np.sign(margins) + 1) / 2, np.nan)
        found["accuracy"] = interval(mean_by_prompt(prompts[::2], right))
        found["pairs"] = int(np.isfinite(margins).sum())
    return found


def write_scored(scored: FileScores, out: Path) -> None:
    """Writes a row an answer, or a row a pair, as Parquet or JSON lines, by the name's end."""
    rows = list(pair_rows(scored) if scored.answers.pairs else answer_rows(scored))
    with stage_file(out.parent, out) as path:
        if out.suffix == ".parquet":
            write_table(pa.table({name: column([row[name] for row in rows]) for name in rows[0]}), path)
        else:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")


def column(values: list[Any]) -> pa.Array:
    """The values as Arrow infers them; as JSON where it cannot."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value, ensure_ascii=False, default=str) for value in values], pa.string())


def answer_rows(scored: FileScores) -> Iterator[dict[str, Any]]:
    """The row as it was read and its score; a column of the file that bears such a name is kept as `given_NAME`."""
    answers = scored.answers
    names = {name: f"given_{name}" if name in OWN else name for name in answers.columns}
    written = answers.completions if answers.written is None else answers.written
    for i, score in enumerate(scored.scores):
        others = {names[name]: values[i] for name, values in answers.columns.items()}
        asked = {"row": answers.rows[i], "prompt": answers.prompts[i], "completion": written[i]}
        yield {**asked, **others, "score": score.value, "status": score.status.value, "detail": detail_of(score)}


def pair_rows(scored: FileScores) -> Iterator[dict[str, Any]]:
    """Both answers with their scores; `margin` is by how much the preferred one is ahead."""
    answers = scored.answers
    for i in range(0, len(scored.scores), 2):
        chosen, rejected = scored.scores[i : i + 2]
        told = [one for one in (chosen, rejected) if one.status in FAILED]
        margin = None if chosen.value is None or rejected.value is None else chosen.value - rejected.value
        yield {
            "row": answers.rows[i],
            "prompt": answers.prompts[i],
            "chosen": answers.completions[i],
            "rejected": answers.completions[i + 1],
            "score_chosen": chosen.value,
            "score_rejected": rejected.value,
            "margin": margin,
            "status": (
                told[0].status if told else ScoreStatus.NOT_APPLICABLE if margin is None else ScoreStatus.OK
            ).value,
            "detail": "; ".join(filter(None, map(detail_of, (chosen, rejected)))),
        }
