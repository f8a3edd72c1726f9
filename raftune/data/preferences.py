"""Reads preferences as pairs: HH-RLHF dialogues, TRL's explicit and implicit formats, and rankings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from raftune.data.columns import (
    COMPLETIONS,
    PROMPT,
    RANKS,
    SCORES,
    asked,
    check_answer,
    check_prompt,
    find,
    has,
    read_answer,
    read_list,
    read_number,
    same,
)
from raftune.data.rows import Feedback, PreferencePair, SkipReason, UnusableRow
from raftune.data.source import collect
from raftune.data.turns import (
    Message,
    answer_text,
    begins,
    ends_with_assistant,
    excerpt,
    has_turns,
    parse_dialogue,
    prompt_text,
    read_messages,
    shared_turns,
)
from raftune.records import PromptContent, Row

Form = Literal["text", "messages"]
HH = "HH-RLHF dialogues"
EXPLICIT, IMPLICIT, RANKED = "explicit preferences", "implicit preferences", "ranked answers"
WANTED = (
    "A preference has chosen and rejected, with a prompt of their own or as dialogues that share their first turns; "
    "or prompt, completions, and ranks or scores."
)


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """The two answers as they were found; a dialogue of HH-RLHF is messages until it is asked for as a text."""

    format: str
    prompt: PromptContent
    chosen: Any
    rejected: Any

    def as_pair(self, row: int, dialogues: Form) -> PreferencePair:
        if self.format == HH and dialogues == "text":
            assert isinstance(self.prompt, list)
            return PreferencePair(row, prompt_text(self.prompt), answer_text(self.chosen), answer_text(self.rejected))
        return PreferencePair(row, self.prompt, self.chosen, self.rejected)


def read_preferences(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    dialogues: Form = "text",
    columns: Mapping[str, str] | None = None,
) -> Feedback[PreferencePair]:
    """The pairs of any preference data, and the rows that hold none. Raises DataError where no row is usable.

    `dialogues` says what HH-RLHF's become: texts as they stand, or messages. K ranked answers give K(K-1)/2 pairs, of
    which those with equal rank are none. `field` is what the source is called in an error.
    """

    def read(number: int, row: Row) -> tuple[str, list[PreferencePair]]:
        found = list(preferred(row))
        return found[0].format, [one.as_pair(number, dialogues) for one in found]

    return collect(source, split, field, read, WANTED, columns)


def preferred(row: Row) -> Iterator[PreferenceRow]:
    """What the row prefers to what: one pair, or several of ranked answers; never none. Raises Unusable."""
    if has(row, COMPLETIONS) and (has(row, RANKS) or has(row, SCORES)):
        return ranked(row)
    _, chosen = find(row, ("chosen",))
    _, rejected = find(row, ("rejected",))
    if has(row, PROMPT) and not (isinstance(find(row, PROMPT)[1], str) and whole_dialogues(chosen, rejected)):
        return iter([explicit(row, chosen, rejected)])
    return iter([implicit(chosen, rejected)])


def whole_dialogues(chosen: Any, rejected: Any) -> bool:
    """Whether both are lists of several messages: then they repeat the prompt that stands beside them as a text."""
    return all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected))


def explicit(row: Row, chosen: Any, rejected: Any) -> PreferenceRow:
    """Two answers beside their prompt."""
    _, prompt = asked(row)
    answers = [read_answer(chosen, prompt, "chosen"), read_answer(rejected, prompt, "rejected")]
    return told_apart(EXPLICIT, prompt, *answers)


def implicit(chosen: Any, rejected: Any) -> PreferenceRow:
    """Two dialogues that begin alike: the turns that they share are the prompt."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{name} is blank")
            if not has_turns(text):
                raise UnusableRow(
                    SkipReason.NO_SHARED_PREFIX, f"{name} has no turns (Human:, Assistant:), and no prompt"
                )
        return split_dialogues(HH, parse_dialogue(chosen, "chosen"), parse_dialogue(rejected, "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return split_dialogues(IMPLICIT, read_messages(chosen, "chosen"), read_messages(rejected, "rejected"))
    raise UnusableRow(
        SkipReason.WRONG_TYPE,
        f"chosen and rejected must be two texts or two lists of messages; got {excerpt(chosen)}, {excerpt(rejected)}",
    )


def split_dialogues(form: str, chosen: list[Message], rejected: list[Message]) -> PreferenceRow:
    """The dialogues parted where they part, after a turn of the user's."""
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        ends_with_assistant(begins(messages, column), column)
    shared = shared_turns(chosen, rejected)
    if not shared:
        raise UnusableRow(
            SkipReason.NO_SHARED_PREFIX,
            f"chosen begins with {excerpt(chosen[0]['content'])}, rejected with {excerpt(rejected[0]['content'])}",
        )
    check_prompt(chosen[:shared], "prompt")
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        check_answer(messages[shared:], column)
    return told_apart(form, chosen[:shared], chosen[shared:], rejected[shared:])


def told_apart(form: str, prompt: PromptContent, chosen: Any, rejected: Any) -> PreferenceRow:
    if same(chosen, rejected):
        raise UnusableRow(SkipReason.SAME, f"both are {excerpt(chosen)}")
    return PreferenceRow(form, prompt, chosen, rejected)


def ranked(row: Row) -> Iterator[PreferenceRow]:
    """K answers with ranks (1 is best) or scores (more is better): every better one against every worse one."""
    prompt, answers, worth = ranking(row)
    order = sorted(range(len(answers)), key=lambda i: -worth[i])  # stable: the given order among equals
    pairs = [(i, j) for i, j in combinations(order, 2) if worth[i] > worth[j]]
    if not pairs:
        raise UnusableRow(SkipReason.ALL_TIED, f"{len(answers)} answers, all of the same rank")
    apart = [(i, j) for i, j in pairs if not same(answers[i], answers[j])]
    if not apart:
        raise UnusableRow(SkipReason.SAME, f"all are {excerpt(answers[0])}")
    return (PreferenceRow(RANKED, prompt, answers[i], answers[j]) for i, j in apart)


def ranking(row: Row) -> tuple[PromptContent, list[Any], list[float]]:
    """The prompt, its answers, and what each is worth: its score, or less its rank."""
    _, prompt = asked(row)
    column, listed = find(row, COMPLETIONS)
    answers = [read_answer(each, prompt, f"{column}[{i}]") for i, each in enumerate(read_list(listed, column))]
    worth_column, numbers = find(row, (*SCORES, *RANKS))
    sign = 1.0 if worth_column in SCORES else -1.0
    worth = [
        sign * read_number(each, f"{worth_column}[{i}]") for i, each in enumerate(read_list(numbers, worth_column))
    ]
    if len(worth) != len(answers):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{len(answers)} {column}, but {len(worth)} {worth_column}")
    return prompt, answers, worth
