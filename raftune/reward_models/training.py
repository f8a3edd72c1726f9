"""Trains, evaluates and saves a reward model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raftune.arrays import FloatArray
from raftune.config.reward_model import RewardModelConfig
from raftune.data.classifier_inputs import ClassifierInputs, write_notes
from raftune.data.rows import write_skipped
from raftune.errors import DataError, ModelError
from raftune.evaluation.bootstrap import numbers_by_key
from raftune.protocols import Callback, Reward
from raftune.reward_models.backbone import Backbone, open_backbone
from raftune.reward_models.examples import (
    FeedbackExample,
    FeedbackSource,
    HeldOutSplit,
    answer_lengths,
    identity_of,
    prompt_key,
    read_examples,
)
from raftune.reward_models.fitting import RatingScale, RewardFit, fit, ratings_of
from raftune.reward_models.folder import HELD_OUT, SKIPPED, RewardModelFolder
from raftune.reward_models.gate import better_than_length, verdict
from raftune.reward_models.pairwise import pairwise_report
from raftune.reward_models.pointwise import pointwise_report
from raftune.store.files import discard, stage_file, write_json
from raftune.store.parquet import write_table
from raftune.store.run import RunFolder
from raftune.training.quiet import quiet

CHUNK = 1024  # answers in one call of the model as a reward
POINTS = 50  # of the curve of losses in the report
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class RewardTrainingOutcome:
    """What came of it: the report; whether model/ is there; whether anything had to be done."""

    root: Path
    report: dict[str, Any]
    published: bool
    worked: bool


def train_reward_model(
    config: RewardModelConfig, score_with: Callable[[Path], Reward], observe: Callback = lambda kind, facts: None
) -> RewardTrainingOutcome:
    """A reward model under `output_dir`, its report, and every held-out row with its scores.

    score_with: makes a reward of the saved folder: what judges the model is what will use it. Called again with the
    same configuration it goes on from the last checkpoint, or finds everything done. A model that is not better than
    chance stays under work/, unless `allow_chance`. Raises ConfigError, DataError, ModelError, StoreError.
    """
    run = RunFolder(Path(config.output_dir).expanduser())
    folder = RewardModelFolder(run.root)
    folder.refuse_foreign()
    with run.lock():
        folder.claim(config)
        worked = not folder.report.is_file()
        if worked:
            work(config, folder, run.tmp, score_with, observe)
        report = json.loads(folder.report.read_bytes())
        if not folder.model.is_dir() and (report["better_than_chance"] or config.allow_chance):
            publish(folder)
        if folder.model.is_dir():
            discard(folder.work, run.tmp)  # a kill may have come between the model and this
        run.tmp.rmdir()
    return RewardTrainingOutcome(run.root, report, folder.model.is_dir(), worked)


def work(
    config: RewardModelConfig,
    folder: RewardModelFolder,
    tmp: Path,
    score_with: Callable[[Path], Reward],
    observe: Callback,
) -> None:
    """Reads, trains, judges, and writes the report, each unless an earlier call did."""
    torch.set_num_threads(config.threads)  # they shape the sums, and so the bits
    observe("begin", {"what": "reading and encoding the rows"})
    backbone = open_backbone(config)
    for words in backbone.said:
        observe("said", {"words": words})
    with quiet():
        source, split = read_examples(config, backbone.tokenizer, backbone.reading)
    scale = scale_of(split, source)
    note_data(folder, tmp, source, split, observe)
    told = trained(config, folder, backbone, source, split, scale, observe)
    report = judged(folder, tmp, backbone, source, split, scale, score_with, observe)
    better, why = verdict(source.objective, report)
    whole = {"objective": source.objective, "better_than_chance": better, "verdict": why, **report, **told}
    whole |= {"better_than_length": better_than_length(report)} if source.objective == "pairwise" else {}
    whole |= {"model": config.model, "data": json.loads(folder.data.read_bytes())}
    write_json(tmp, folder.report, whole)


def scale_of(split: HeldOutSplit, source: FeedbackSource) -> RatingScale:
    """The ratings' own scale; of pairs 0 and 1. Raises DataError where all ratings are alike."""
    if source.objective == "pairwise":
        return RatingScale(0.0, 1.0)
    scale = RatingScale.of(split.train)
    if not scale.std > 0:
        raise DataError(f"data must have ratings that differ; all are {scale.mean:g}. There is nothing to learn.")
    return scale


def note_data(
    folder: RewardModelFolder, tmp: Path, source: FeedbackSource, split: HeldOutSplit, observe: Callback
) -> None:
    """Writes and says what was read. Raises ConfigChanged if it is not what an earlier call read."""
    prompts = {name: len({prompt_key(one.prompt, 0) for one in side}) for name, side in sides(split)}
    words, identity = [*source.words, *split.words], identity_of(split)
    noted = {
        "words": words,
        "rows": {name: len(side) for name, side in sides(split)},
        "prompts": prompts,
        "skipped": len(source.skipped),
        "identity": identity,
    }
    for line in words:
        observe("said", {"words": line})
    folder.refuse_other_data(identity)
    with stage_file(tmp, folder.root / SKIPPED) as path:
        write_skipped(source.skipped, path)
    write_json(tmp, folder.data, noted)


def sides(split: HeldOutSplit) -> tuple[tuple[str, list[FeedbackExample]], ...]:
    return ("train", split.train), ("held_out", split.held_out)


def trained(
    config: RewardModelConfig,
    folder: RewardModelFolder,
    backbone: Backbone,
    source: FeedbackSource,
    split: HeldOutSplit,
    scale: RatingScale,
    observe: Callback,
) -> dict[str, Any]:
    """Trains the model and saves it under work/, unless that is done; what is told of it."""
    told = folder.work / "fit.json"
    if not folder.candidate.is_dir():
        observe("begin", {"what": f"training on {len(split.train):,} rows, {source.objective}"})
        fitted = fit(config, source.objective, backbone.load, backbone.tokenizer, split.train, folder.work, observe)
        facts = {"steps": len(fitted.losses), "loss": curve(fitted.losses), "learning_rate": fitted.learning_rate}
        told.write_text(json.dumps(facts), encoding="utf-8")
        save(fitted, backbone, folder.candidate, notes_of(source, backbone.reading, scale))
    return dict(json.loads(told.read_bytes()))


def curve(losses: Sequence[float]) -> list[dict[str, float]]:
    """The losses as at most POINTS means over successive steps, each with the last of its steps."""
    parts = np.array_split(np.array(losses), min(POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return [{"step": int(end), "loss": float(part.mean())} for end, part in zip(ends, parts, strict=True)]


def notes_of(source: FeedbackSource, reading: ClassifierInputs, scale: RatingScale) -> dict[str, Any]:
    """What lies beside the model: how it reads its text, and what its scores mean."""
    read = {
        "include_prompt": reading.include_prompt,
        "append_eos": reading.append_eos,
        "add_special_tokens": reading.special_tokens,
        "max_length": reading.limit,
    }
    ratings = {"ratings": {"mean": scale.mean, "std": scale.std}} if source.objective == "pointwise" else {}
    return {"version": 1, "objective": source.objective, "reading": read, **ratings}


def save(fitted: RewardFit, backbone: Backbone, folder: Path, notes: dict[str, Any]) -> None:
    """Writes a plain transformers folder, which is at its place whole or not at all. Raises ModelError."""
    part = folder.with_suffix(".part")
    tokenizer = copy.deepcopy(backbone.tokenizer)
    if tokenizer.is_fast:  # what the last call truncated by would be saved with it
        tokenizer.backend_tokenizer.no_truncation()
    with quiet():
        fitted.model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    if not any(part.glob("*.safetensors")):
        raise ModelError(f"model {backbone.config.model!r} could not be saved as safetensors. Name another backbone.")
    write_notes(part, notes)
    part.replace(folder)


def judged(
    folder: RewardModelFolder,
    tmp: Path,
    backbone: Backbone,
    source: FeedbackSource,
    split: HeldOutSplit,
    scale: RatingScale,
    score_with: Callable[[Path], Reward],
    observe: Callback,
) -> dict[str, Any]:
    """Scores the held-out rows by the saved model as a reward; writes them, and the distribution beside the model."""
    held_out = split.held_out
    scores = score(score_with(folder.candidate), held_out, observe)
    lengths = np.array(answer_lengths(held_out, backbone.tokenizer), dtype=np.float64)
    prompts = numbers_by_key(pa.array([prompt_key(one.prompt, 0) for one in held_out]))
    distribution = distribution_of(scores)
    write_notes(folder.candidate, {**notes_of(source, backbone.reading, scale), "distribution": distribution})
    with stage_file(tmp, folder.root / HELD_OUT) as path:
        write_table(held_out_table(held_out, scores, lengths), path)
    if source.objective == "pairwise":
        return {**pairwise_report(scores, lengths, prompts), "distribution": distribution}
    found = pointwise_report(scores[:, 0], ratings_of(held_out), lengths[:, 0], prompts, scale.mean, scale.std)
    return {**found, "distribution": distribution}


def score(reward: Reward, examples: Sequence[FeedbackExample], observe: Callback) -> FloatArray:
    """(N, answers) scores. Raises ModelError where one is not finite."""
    prompts = [one.prompt for one in examples for _ in one.answers]
    answers = [answer for one in examples for answer in one.answers]
    values: list[float | None] = []
    observe("begin", {"what": f"judging by {len(examples):,} held-out rows"})
    for start in range(0, len(answers), CHUNK):
        part = slice(start, start + CHUNK)
        values += reward(prompts=prompts[part], completions=answers[part])
        observe("progress", {"done": len(values), "of": len(answers)})
    scores = np.array(values, dtype=np.float64).reshape(len(examples), -1)
    if not np.isfinite(scores).all():
        raise ModelError("Every score must be finite; got NaN or infinity. Nothing was saved: lower learning_rate.")
    return scores


def distribution_of(scores: FloatArray) -> dict[str, Any]:
    """Mean, standard deviation and quantiles of all held-out scores: what `normalize` goes by."""
    quantiles = {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES}
    return {"n": scores.size, "mean": float(scores.mean()), "std": float(scores.std()), "quantiles": quantiles}


def held_out_table(
    examples: Sequence[FeedbackExample],
    scores: FloatArray,
    lengths: FloatArray,
) -> pa.Table:
    """Every held-out row: texts as they are, messages as JSON; scores and tokens of each answer; margin or rating."""
    names = ("chosen", "rejected") if len(examples[0].answers) == 2 else ("completion",)
    columns: dict[str, Any] = {
        "row": pa.array([one.row for one in examples], pa.int64()),
        "prompt": pa.array([as_text(one.prompt) for one in examples], pa.string()),
    }
    for i, name in enumerate(names):
        columns[name] = pa.array([as_text(one.answers[i]) for one in examples], pa.string())
    for i, name in enumerate(names):
        columns[f"score_{name}" if len(names) == 2 else "score"] = pa.array(scores[:, i])
        columns[f"tokens_{name}" if len(names) == 2 else "tokens"] = pa.array(lengths[:, i].astype(np.int32))
    if len(names) == 2:
        columns["margin"] = pa.array(scores[:, 0] - scores[:, 1])
    else:
        columns["rating"] = pa.array([one.rating for one in examples], pa.float64())
    return pa.table(columns)


def as_text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def publish(folder: RewardModelFolder) -> None:
    """Puts the model at its place. Raises ModelError if a person has removed what was trained."""
    if not folder.candidate.is_dir():
        raise ModelError(f"{folder.candidate} is gone. Remove {folder.root}, and train again.")
    folder.publish()
