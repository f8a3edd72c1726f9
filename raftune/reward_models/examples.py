"""Token rows for training and for held-out evaluation, split by prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from raftune.config.reward_model import RewardModelConfig
from raftune.data.classifier_inputs import ClassifierInputs, tokens
from raftune.data.feedback import read_preferences, read_ratings
from raftune.data.rows import Feedback, PreferencePair, Rating, SkippedRow
from raftune.errors import DataError, RewardError
from raftune.records import PromptContent
from raftune.store.files import sha256_hex

FeedbackKind = Literal["pairwise", "pointwise"]
FEWEST_HELD_OUT = 20  # prompts: a narrower share of few prompts could show nothing


@dataclass(frozen=True, slots=True)
class FeedbackExample:
    """One row of feedback as the model reads it.

    answers: the preferred and the other, or the one that was rated; ids: the tokens of prompt and answer, for each;
    cut: how many of them lost their beginning.
    """

    row: int
    prompt: PromptContent
    answers: tuple[Any, ...]
    ids: tuple[list[int], ...]
    rating: float | None = None
    cut: int = 0


@dataclass(frozen=True, slots=True)
class FeedbackSource:
    """The examples of one source, its skipped rows, and notes for the user."""

    examples: list[FeedbackExample]
    skipped: list[SkippedRow]
    words: tuple[str, ...]
    objective: FeedbackKind


@dataclass(frozen=True, slots=True)
class HeldOutSplit:
    """The two sides. No prompt is on both."""

    train: list[FeedbackExample]
    held_out: list[FeedbackExample]
    words: tuple[str, ...] = ()


def read_examples(
    config: RewardModelConfig, tokenizer: Any, reading: ClassifierInputs
) -> tuple[FeedbackSource, HeldOutSplit]:
    """The configured data, encoded and split. Raises DataError where a side would be empty."""
    source = _read_source(config, "data", config.objective, tokenizer, reading)
    if config.held_out is None:
        return source, split_by_prompt(source.examples, config.held_out_fraction, config.seed)
    other = _read_source(config, "held_out", source.objective, tokenizer, reading)
    split = without_overlap(source.examples, other.examples, config.held_out)
    return replace(source, words=(*source.words, *other.words)), split


def _read_source(
    config: RewardModelConfig, field: str, objective: str, tokenizer: Any, reading: ClassifierInputs
) -> FeedbackSource:
    """One source, encoded. Raises DataError where it holds nothing that fits the objective."""
    name, part = config.data, config.split
    if field == "held_out" and config.held_out is not None:
        name, part = config.held_out, config.held_out_split
    low, high, columns = config.lowest_rating, config.highest_rating, config.columns
    feedback = _read_feedback(
        {
            "pairwise": partial(read_preferences, name, part, field=field, dialogues=config.dialogues, columns=columns),
            "pointwise": partial(read_ratings, name, part, field=field, low=low, high=high, columns=columns),
        },
        objective,
    )
    untruncated, skipped, kept = replace(reading, limit=None), [*feedback.skipped], []
    alike = f"chosen and rejected are the same within the last {reading.limit} tokens"
    for row in feedback.rows:
        answers = (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)
        try:
            ids = [tokens(tokenizer, row.prompt, answer, untruncated) for answer in answers]
            long = [i for i, text in enumerate(ids) if reading.limit is not None and len(text) > reading.limit]
            for i in long:
                ids[i] = tokens(tokenizer, row.prompt, answers[i], reading)
        except RewardError as error:  # messages, and a tokenizer without a chat template
            raise DataError(
                f"{field}: its rows are messages, and the tokenizer of {config.model!r} has no chat template. Give the "
                "tokenizer one, or data of plain texts."
            ) from error
        if len(ids) == 2 and ids[0] == ids[1]:
            skipped.append(SkippedRow(row.row, "the same tokens", alike))
        else:
            rating = None if isinstance(row, PreferencePair) else row.score
            kept.append(FeedbackExample(row.row, row.prompt, answers, tuple(ids), rating, len(long)))
    if not kept:
        raise DataError(f"{field}: in all rows of {name}, {alike}. Raise max_length.")
    words = feedback.words()
    if count := len(skipped) - len(feedback.skipped):
        words.append(f"  {count:,} skipped: {alike}")
    if cut := sum(example.cut for example in kept):
        limit = f"longer than {reading.limit} tokens"
        words.append(f"  {cut:,} texts are {limit}: the beginning of their prompts is left out")
    return FeedbackSource(kept, skipped, tuple(words), "pointwise" if kept[0].rating is not None else "pairwise")


def _read_feedback(
    readers: Mapping[str, Callable[[], Feedback[PreferencePair] | Feedback[Rating]]], objective: str
) -> Feedback[PreferencePair] | Feedback[Rating]:
    """Pairs or ratings; with `auto`, pairs where there are any. Raises DataError, with both reasons for `auto`."""
    first = "pointwise" if objective == "pointwise" else "pairwise"
    other = "pairwise" if first == "pointwise" else "pointwise"
    try:
        return readers[first]()
    except DataError as error:
        try:
            feedback = readers[other]()
        except DataError as second:
            if objective != "auto" or str(second) == str(error):
                raise error from None
            raise DataError(f"as preferences, {error}\nas ratings, {second}") from second
        if objective == "auto":
            return feedback
        kind = "preferences" if other == "pairwise" else "ratings"
        raise DataError(f"{error} These rows are {kind}: set objective: {other}.") from error


def split_by_prompt(examples: Sequence[FeedbackExample], fraction: float, seed: int) -> HeldOutSplit:
    """The prompts with the smallest hashes are held out, with all their rows: a function of prompts and seed alone.

    At least FEWEST_HELD_OUT of them, or half. Raises DataError where there are fewer than two prompts.
    """
    keys = [prompt_key(example.prompt, seed) for example in examples]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise DataError(
            "data must have at least two prompts, of which one is held out; all rows have the same. Give held_out, or "
            "more prompts."
        )
    fewest = max(1, min(FEWEST_HELD_OUT, len(prompts) // 2))
    held_out = set(prompts[: min(max(round(fraction * len(prompts)), fewest), len(prompts) - 1)])
    sides: dict[bool, list[FeedbackExample]] = {True: [], False: []}
    for key, example in zip(keys, examples, strict=True):
        sides[key in held_out].append(example)
    return HeldOutSplit(sides[False], sides[True])


def without_overlap(train: Sequence[FeedbackExample], held_out: Sequence[FeedbackExample], name: str) -> HeldOutSplit:
    """Both sides, without the held-out rows whose prompts are trained on. Raises DataError where none is left."""
    trained = {prompt_key(example.prompt, 0) for example in train}
    kept = [example for example in held_out if prompt_key(example.prompt, 0) not in trained]
    if not kept:
        raise DataError(
            f"held_out must have prompts that `data` lacks; all {len(held_out):,} rows of {name} have prompts that are "
            "learned from. Leave held_out away: a share of the prompts of `data` is held out then."
        )
    overlap = len(held_out) - len(kept)
    words = f"{overlap:,} of {len(held_out):,} held-out rows left out: their prompts are learned from"
    return HeldOutSplit(list(train), kept, (words,) if overlap else ())


def prompt_key(prompt: PromptContent, seed: int) -> str:
    """A hash of the prompt and the seed."""
    return sha256_hex([json.dumps([seed, prompt], sort_keys=True, ensure_ascii=False)])


def identity_of(split: HeldOutSplit) -> str:
    """A hash over all tokens and ratings on either side: another means other data, or another tokenizer."""
    sides = ([json.dumps([row.row, row.ids, row.rating]) for row in side] for side in (split.train, split.held_out))
    return sha256_hex(text for side in sides for text in (*side, "side"))[:16]
