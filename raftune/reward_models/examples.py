"""Token rows for training and for held-out evaluation, split by prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from raftune.config.reward_model import RewardModelConfig
from raftune.data.classifier_inputs import ClassifierInputs, text_of, tokens
from raftune.data.preferences import read_preferences
from raftune.data.ratings import read_ratings
from raftune.data.rows import Feedback, PreferencePair, Rating, SkippedRow
from raftune.errors import DataError, RewardError
from raftune.records import PromptContent

FeedbackKind = Literal["pairwise", "pointwise"]
WANTED = 20  # held-out prompts: a narrower share of few prompts could show nothing
T = TypeVar("T")
SAME_TOKENS = "the same tokens"


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
    """What was read of one source: examples, skipped rows, and what to say of them."""

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
    """What the configuration's data says, encoded and split. Raises DataError where a side would be empty."""
    source = read_source(config, config.data, config.split, config.objective, "data", tokenizer, reading)
    if config.held_out is None:
        return source, split_by_prompt(source.examples, config.held_out_fraction, config.seed)
    other = read_source(
        config, config.held_out, config.held_out_split, source.objective, "held_out", tokenizer, reading
    )
    split = without_overlap(source.examples, other.examples, config.held_out)
    return replace(source, words=(*source.words, *other.words)), split


def read_source(
    config: RewardModelConfig,
    name: str,
    part: str,
    objective: str,
    field: str,
    tokenizer: Any,
    reading: ClassifierInputs,
) -> FeedbackSource:
    """One source, encoded. Raises DataError where it holds nothing that fits the objective."""
    found = read_feedback(config, name, part, objective, field)
    kind: FeedbackKind = "pairwise" if isinstance(found.rows[0], PreferencePair) else "pointwise"
    try:
        examples = [encoded(row, tokenizer, reading) for row in found.rows]
    except RewardError as error:  # messages, and a tokenizer without a chat template
        raise DataError(
            f"{field}: its rows are messages, and the tokenizer of {config.model!r} has no chat template. Give the "
            "tokenizer one, or data of plain texts."
        ) from error
    alike = [one for one in examples if len(one.ids) == 2 and one.ids[0] == one.ids[1]]
    told = f"chosen and rejected are the same within the last {reading.limit} tokens"
    skipped = [*found.skipped, *(SkippedRow(one.row, SAME_TOKENS, told) for one in alike)]
    kept = [one for one in examples if not (len(one.ids) == 2 and one.ids[0] == one.ids[1])]
    if not kept:
        raise DataError(f"{field}: in all rows of {name}, {told}. Raise max_length.")
    words = [*found.words(), *([f"  {len(alike):,} skipped: {told}"] if alike else []), *about_cuts(kept, reading)]
    return FeedbackSource(kept, skipped, tuple(words), kind)


def read_feedback(
    config: RewardModelConfig, name: str, part: str, objective: str, field: str
) -> Feedback[PreferencePair] | Feedback[Rating]:
    """Pairs or ratings; with `auto`, pairs where there are any. Raises DataError, with both reasons for `auto`."""

    def pairs() -> Feedback[PreferencePair]:
        return read_preferences(name, part, field=field, dialogues=config.dialogues, columns=config.columns)

    def ratings() -> Feedback[Rating]:
        return read_ratings(
            name, part, field=field, low=config.lowest_rating, high=config.highest_rating, columns=config.columns
        )

    if objective == "pointwise":
        return only(ratings, pairs, "preferences: set objective: pairwise")
    if objective == "pairwise":
        return only(pairs, ratings, "ratings: set objective: pointwise")
    try:
        return pairs()
    except DataError as no_pairs:
        try:
            return ratings()
        except DataError as no_ratings:
            if str(no_ratings) == str(no_pairs):
                raise
            raise DataError(f"as preferences, {no_pairs}\nas ratings, {no_ratings}") from no_ratings


def only(wanted: Callable[[], T], other: Callable[[], object], they_are: str) -> T:
    """What `wanted` reads. Raises its DataError, which says what the rows are where `other` can read them."""
    try:
        return wanted()
    except DataError as error:
        try:
            other()
        except DataError:
            raise error from None
        raise DataError(f"{error} These rows are {they_are}.") from error


def encoded(row: PreferencePair | Rating, tokenizer: Any, reading: ClassifierInputs) -> FeedbackExample:
    """The row with the tokens of each of its answers."""
    answers = (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)
    whole = replace(reading, limit=None)
    ids = [tokens(tokenizer, row.prompt, answer, whole) for answer in answers]
    long = [i for i, one in enumerate(ids) if reading.limit is not None and len(one) > reading.limit]
    for i in long:
        ids[i] = tokens(tokenizer, row.prompt, answers[i], reading)
    rating = None if isinstance(row, PreferencePair) else row.score
    return FeedbackExample(row.row, row.prompt, answers, tuple(ids), rating, len(long))


def about_cuts(examples: Iterable[FeedbackExample], reading: ClassifierInputs) -> list[str]:
    cut = sum(one.cut for one in examples)
    if not cut:
        return []
    return [f"  {cut:,} texts are longer than {reading.limit} tokens: the beginning of their prompts is left out"]


def answer_lengths(examples: Sequence[FeedbackExample], tokenizer: Any) -> list[list[int]]:
    """Tokens of each answer alone, without its prompt and without special tokens."""
    return [
        [len(tokenizer(text_of(answer), add_special_tokens=False)["input_ids"]) for answer in one.answers]
        for one in examples
    ]


def split_by_prompt(examples: Sequence[FeedbackExample], fraction: float, seed: int) -> HeldOutSplit:
    """The prompts with the smallest hashes are held out, with all their rows: a function of prompts and seed alone.

    At least WANTED of them, or half. Raises DataError where there are fewer than two prompts.
    """
    places = {prompt_key(one.prompt, seed): 0 for one in examples}
    if len(places) < 2:
        raise DataError(
            "data must have at least two prompts, of which one is held out; all rows have the same. Give held_out, or "
            "more prompts."
        )
    fewest = max(1, min(WANTED, len(places) // 2))
    count = min(max(round(fraction * len(places)), fewest), len(places) - 1)
    chosen = set(sorted(places)[:count])
    held_out = [one for one in examples if prompt_key(one.prompt, seed) in chosen]
    train = [one for one in examples if prompt_key(one.prompt, seed) not in chosen]
    return HeldOutSplit(train, held_out)


def without_overlap(train: Sequence[FeedbackExample], held_out: Sequence[FeedbackExample], name: str) -> HeldOutSplit:
    """The two sides as they were given, less the held-out rows whose prompts are trained on, which are counted.

    Raises DataError where nothing is left to judge by.
    """
    learned = {prompt_key(one.prompt, 0) for one in train}
    kept = [one for one in held_out if prompt_key(one.prompt, 0) not in learned]
    if not kept:
        raise DataError(
            f"held_out must have prompts that `data` lacks; all {len(held_out):,} rows of {name} have prompts that are "
            "learned from. Leave held_out away: a share of the prompts of `data` is held out then."
        )
    met = len(held_out) - len(kept)
    words = f"{met:,} of {len(held_out):,} held-out rows left out: their prompts are learned from"
    return HeldOutSplit(list(train), kept, (words,) if met else ())


def prompt_key(prompt: PromptContent, seed: int) -> str:
    content = json.dumps([seed, prompt], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def identity_of(split: HeldOutSplit) -> str:
    """A hash over all tokens and ratings on either side: another means other data, or another tokenizer."""
    digest = hashlib.sha256()
    for side in (split.train, split.held_out):
        for one in side:
            digest.update(json.dumps([one.row, one.ids, one.rating]).encode())
        digest.update(b"side")
    return digest.hexdigest()[:16]
