"""Trains, evaluates and saves a reward model.

config.yaml          the configuration
data.json            what was read: counts, formats, and a hash over all of it
skipped.jsonl        every skipped row, with its reason
work/                checkpoints, and the trained model until it is evaluated; removed once model/ is there
held_out.parquet     every held-out row with its scores
report.json          metrics of the model
model/               the model: a plain transformers folder
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raftune.arrays import FloatArray
from raftune.config.reward_model import RewardModelConfig
from raftune.data.classifier_inputs import text_of, write_notes
from raftune.data.rows import write_skipped
from raftune.errors import ConfigChanged, DataError, ModelError
from raftune.evaluation.bootstrap import numbers_by_key
from raftune.protocols import Callback, Reward
from raftune.reward_models.backbone import open_backbone
from raftune.reward_models.examples import FeedbackExample, identity_of, prompt_key, read_examples
from raftune.reward_models.fitting import fit
from raftune.reward_models.metrics import better_than_length, pairwise_report, pointwise_report, verdict
from raftune.store.committed import write_manifest
from raftune.store.files import discard, publish_directory, stage_file, write_json
from raftune.store.parquet import write_table
from raftune.store.run import RunFolder
from raftune.store.training_folder import DATA, HELD_OUT, REPORT, SKIPPED, open_training
from raftune.training.quiet import quiet

WITHOUT_EFFECT = frozenset({"output_dir", "allow_chance"})  # fields on which no result depends
CHUNK = 1024  # answers in one call of the model as a reward
POINTS = 50  # of the curve of losses in the report
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class RewardTrainingOutcome:
    """The report; whether model/ is there; whether anything had to be done."""

    root: Path
    report: dict[str, Any]
    published: bool
    worked: bool


def train_reward_model(
    config: RewardModelConfig, score_with: Callable[[Path], Reward], observe: Callback = lambda kind, facts: None
) -> RewardTrainingOutcome:
    """A reward model under `output_dir`, its report, and every held-out row with its scores.

    score_with: makes a reward of the saved folder, which evaluates the model as it will be used. Called again with the
    same configuration, it resumes from the last checkpoint. A model that is not better than chance stays under work/,
    unless `allow_chance`. Raises ConfigError, DataError, ModelError, StoreError.
    """
    with open_training(config, "raftune reward train", has_work=_has_work, without_effect=WITHOUT_EFFECT) as run:
        root, model, candidate = run.root, run.root / "model", run.root / "work" / "model"
        worked = not (root / REPORT).is_file()
        if worked:
            _train_and_evaluate(config, run, score_with, observe)
        report = json.loads((root / REPORT).read_bytes())
        if not model.is_dir() and (report["better_than_chance"] or config.allow_chance):
            if not candidate.is_dir():
                raise ModelError(f"{candidate} is gone. Remove {root}, and train again.")
            write_manifest(candidate)
            publish_directory(candidate, model)
        if model.is_dir():
            discard(root / "work", run.tmp)  # a kill may have come between the model and this
        shutil.rmtree(run.tmp)
    return RewardTrainingOutcome(root, report, model.is_dir(), worked)


def _has_work(root: Path) -> bool:
    """Whether there is work that another configuration, or other data, would throw away."""
    work = root / "work"
    return (root / REPORT).is_file() or (work / "model").is_dir() or any(work.glob("checkpoint-*"))


def _train_and_evaluate(
    config: RewardModelConfig, run: RunFolder, score_with: Callable[[Path], Reward], observe: Callback
) -> None:
    """Reads, trains, evaluates, and writes the report, each unless an earlier call did."""
    root, work, candidate = run.root, run.root / "work", run.root / "work" / "model"
    torch.set_num_threads(config.threads)  # the order of sums depends on it
    observe("begin", {"what": "reading and encoding the rows"})
    backbone = open_backbone(config)
    for note in backbone.notes:
        observe("said", {"words": note})
    with quiet():
        source, split = read_examples(config, backbone.tokenizer, backbone.reading)
    pairwise, (mean, std) = source.objective == "pairwise", (0.0, 1.0)
    if not pairwise:
        ratings = _ratings(split.train)
        mean, std = float(ratings.mean()), float(ratings.std())
        if not std > 0:
            raise DataError(f"data must have ratings that differ; all are {mean:g}. There is nothing to learn.")

    data: dict[str, Any] = {
        "words": [*source.words, *split.words],
        "rows": {"train": len(split.train), "held_out": len(split.held_out)},
        "prompts": {
            name: len({prompt_key(example.prompt, 0) for example in side})
            for name, side in (("train", split.train), ("held_out", split.held_out))
        },
        "skipped": len(source.skipped),
        "identity": identity_of(split),
    }
    for line in data["words"]:
        observe("said", {"words": line})
    path = root / DATA
    if _has_work(root) and path.is_file() and json.loads(path.read_bytes())["identity"] != data["identity"]:
        raise ConfigChanged(
            f"{root} was started with other data, or another tokenizer, under the same names. Choose another "
            "output_dir, or remove this one."
        )
    with stage_file(run.tmp, root / SKIPPED) as staged:
        write_skipped(source.skipped, staged)
    write_json(run.tmp, path, data)

    reading = {
        "include_prompt": backbone.reading.include_prompt,
        "append_eos": backbone.reading.append_eos,
        "add_special_tokens": backbone.reading.special_tokens,
        "max_length": backbone.reading.limit,
    }
    notes: dict[str, Any] = {"version": 1, "objective": source.objective, "reading": reading}
    if not pairwise:
        notes["ratings"] = {"mean": mean, "std": std}
    if not candidate.is_dir():
        observe("begin", {"what": f"training on {len(split.train):,} rows, {source.objective}"})
        # Ratings are learned in standard deviations from their mean, so that a head without bias can express them.
        targets = None if pairwise else ((_ratings(split.train) - mean) / std).tolist()
        model, losses, rate = fit(config, backbone.load, backbone.tokenizer, split.train, targets, work, observe)
        facts = {"steps": len(losses), "loss": _curve(losses), "learning_rate": rate}
        (work / "fit.json").write_text(json.dumps(facts), encoding="utf-8")
        _save(model, backbone.tokenizer, candidate, notes, config.model)

    held_out = split.held_out
    scores = _score(score_with(candidate), held_out, observe)
    lengths = np.array(  # tokens of each answer alone, without its prompt and without special tokens
        [
            [len(backbone.tokenizer(text_of(a), add_special_tokens=False)["input_ids"]) for a in example.answers]
            for example in held_out
        ],
        dtype=np.float64,
    )
    distribution = {
        "n": scores.size,
        "mean": float(scores.mean()),
        "std": float(scores.std()),
        "quantiles": {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES},
    }
    write_notes(candidate, {**notes, "distribution": distribution})
    with stage_file(run.tmp, root / HELD_OUT) as staged:
        write_table(_held_out_table(held_out, scores, lengths), staged)
    prompts = numbers_by_key(pa.array([prompt_key(example.prompt, 0) for example in held_out]))
    if pairwise:
        report = pairwise_report(scores, lengths, prompts)
        report["better_than_length"] = better_than_length(report)
    else:
        report = pointwise_report(scores[:, 0], _ratings(held_out), lengths[:, 0], prompts, mean, std)
    better, why = verdict(source.objective, report)
    report |= {"objective": source.objective, "better_than_chance": better, "verdict": why}
    report |= {"distribution": distribution, **json.loads((work / "fit.json").read_bytes())}
    write_json(run.tmp, root / REPORT, report | {"model": config.model, "data": data})


def _ratings(examples: Sequence[FeedbackExample]) -> FloatArray:
    return np.array([example.rating for example in examples], dtype=np.float64)


def _curve(losses: Sequence[float]) -> list[dict[str, float]]:
    """The losses as at most POINTS means over successive steps, each with the last of its steps."""
    parts = np.array_split(np.array(losses), min(POINTS, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return [{"step": int(end), "loss": float(part.mean())} for end, part in zip(ends, parts, strict=True)]


def _save(model: Any, tokenizer: Any, folder: Path, notes: dict[str, Any], name: str) -> None:
    """Writes a plain transformers folder, which is at its place whole or not at all. Raises ModelError."""
    part = folder.with_suffix(".part")
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.is_fast:  # the truncation of the last call would be saved with it
        tokenizer.backend_tokenizer.no_truncation()
    with quiet():
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    if not any(part.glob("*.safetensors")):
        raise ModelError(f"model {name!r} could not be saved as safetensors. Name another backbone.")
    write_notes(part, notes)
    part.replace(folder)


def _score(reward: Reward, examples: Sequence[FeedbackExample], observe: Callback) -> FloatArray:
    """(N, answers) scores. Raises ModelError where one is not finite."""
    prompts = [example.prompt for example in examples for _ in example.answers]
    answers = [answer for example in examples for answer in example.answers]
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


def _held_out_table(examples: Sequence[FeedbackExample], scores: FloatArray, lengths: FloatArray) -> pa.Table:
    """Every held-out row: texts as they are, messages as JSON; scores and tokens of each answer; margin or rating."""

    def texts(contents: Sequence[Any]) -> pa.Array:
        return pa.array([c if isinstance(c, str) else json.dumps(c, ensure_ascii=False) for c in contents], pa.string())

    pairs = len(examples[0].answers) == 2
    names = {"chosen": "_chosen", "rejected": "_rejected"} if pairs else {"completion": ""}
    columns: dict[str, Any] = {
        "row": pa.array([example.row for example in examples], pa.int64()),
        "prompt": texts([example.prompt for example in examples]),
    }
    columns |= {name: texts([example.answers[i] for example in examples]) for i, name in enumerate(names)}
    for i, suffix in enumerate(names.values()):
        columns[f"score{suffix}"] = pa.array(scores[:, i])
        columns[f"tokens{suffix}"] = pa.array(lengths[:, i].astype(np.int32))
    if pairs:
        columns["margin"] = pa.array(scores[:, 0] - scores[:, 1])
    else:
        columns["rating"] = pa.array([example.rating for example in examples], pa.float64())
    return pa.table(columns)
