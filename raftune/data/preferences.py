"""Reads preferences as pairs: HH-RLHF dialogues, TRL's explicit and implicit formats, and rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any, Literal

from raftune.data.columns import (
    COMPLETIONS,
    PROMPT,
    RANKS,
    SCORES,
    Message,
    check_answer,
    check_assistant_ends,
    check_prompt,
    check_user_begins,
    completion_text,
    excerpt,
    find,
    has,
    has_turns,
    parse_dialogue,
    prompt_of,
    prompt_text,
    read_answer,
    read_list,
    read_messages,
    read_number,
    same,
)
from raftune.data.rows import Feedback, PreferencePair, SkipReason, UnusableRow
from raftune.data.source import collect
from raftune.records import PromptContent, Row

Form = Literal["text", "messages"]
HH = "HH-RLHF dialogues"
WANTED = (
    "A preference has chosen and rejected, with a prompt of their own or as dialogues that share their first turns; "
    "or prompt, completions, and ranks or scores."
)


def read_preferences(
    source: str,
    split: str = "train",
    *,
    field: str = "data",
    dialogues: Form = "text",
    columns: Mapping[str, str] | None = None,
) -> Feedback[PreferencePair]:
    """The pairs of any preference data, and the rows that hold none. Raises DataError where no row is usable.

    `dialogues` says whether HH-RLHF's become texts or messages. K ranked completions give K(K-1)/2 pairs, less those
    of equal rank. `field` is what the source is called in an error.
    """

    def read(number: int, row: Row) -> tuple[str, list[PreferencePair]]:
        form, pairs = preferred(row)
        if form == HH and dialogues == "text":
            pairs = [(prompt_text(p), completion_text(c), completion_text(r)) for p, c, r in pairs]
        return form, [PreferencePair(number, *pair) for pair in pairs]

    return collect(source, split, field, read, WANTED, columns)


def preferred(row: Row) -> tuple[str, list[tuple[Any, Any, Any]]]:
    """The row's format, and prompt, chosen and rejected of each pair, at least one. Raises UnusableRow."""
    if has(row, COMPLETIONS) and (has(row, RANKS) or has(row, SCORES)):
        prompt, completions, worth = ranking(row)
        order = sorted(range(len(completions)), key=lambda i: -worth[i])  # stable: the given order among equals
        ranked = [(completions[i], completions[j]) for i, j in combinations(order, 2) if worth[i] > worth[j]]
        if not ranked:
            raise UnusableRow(SkipReason.ALL_TIED, f"{len(completions)} answers, all of the same rank")
        pairs = [(prompt, better, worse) for better, worse in ranked if not same(better, worse)]
        if not pairs:
            raise UnusableRow(SkipReason.SAME, f"all are {excerpt(completions[0])}")
        return "ranked answers", pairs
    _, chosen = find(row, ("chosen",))
    _, rejected = find(row, ("rejected",))
    # Two lists of several messages repeat the prompt that is beside them as a text.
    dialogues = all(isinstance(value, list) and len(value) > 1 for value in (chosen, rejected))
    if has(row, PROMPT) and not (dialogues and isinstance(find(row, PROMPT)[1], str)):
        form, prompt = "explicit preferences", prompt_of(row)[1]
        chosen, rejected = read_answer(chosen, prompt, "chosen"), read_answer(rejected, prompt, "rejected")
    else:
        form, prompt, chosen, rejected = split_dialogues(chosen, rejected)
    if same(chosen, rejected):
        raise UnusableRow(SkipReason.SAME, f"both are {excerpt(chosen)}")
    return form, [(prompt, chosen, rejected)]


def split_dialogues(chosen: Any, rejected: Any) -> tuple[str, list[Message], list[Message], list[Message]]:
    """The format, the turns that two dialogues share up to a turn of the user's, and what follows in each."""
    sides = {"chosen": chosen, "rejected": rejected}
    parse: Callable[[Any, str], list[Message]]
    if isinstance(chosen, str) and isinstance(rejected, str):
        for name, text in sides.items():
            if not text.strip():
                raise UnusableRow(SkipReason.EMPTY_ANSWER, f"{name} is blank")
            if not has_turns(text):
                raise UnusableRow(
                    SkipReason.NO_SHARED_PREFIX, f"{name} has no turns (Human:, Assistant:), and no prompt"
                )
        form, parse = HH, parse_dialogue
    elif isinstance(chosen, list) and isinstance(rejected, list):
        form, parse = "implicit preferences", read_messages
    else:
        raise UnusableRow(
            SkipReason.WRONG_TYPE,
            "chosen and rejected must be two texts or two lists of messages; "
            f"got {excerpt(chosen)}, {excerpt(rejected)}",
        )
    left, right = (parse(value, name) for name, value in sides.items())
    for name, messages in (("chosen", left), ("rejected", right)):
        check_user_begins(messages, name)
        check_assistant_ends(messages, name)
    # The prompt ends with a user's or a tool's turn, and leaves a completion to each.
    most = min(len(left), len(right)) - 1
    shared = next((i for i in range(most) if left[i] != right[i]), most)
    while shared and left[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise UnusableRow(
            SkipReason.NO_SHARED_PREFIX,
            f"chosen begins with {excerpt(left[0]['content'])}, rejected with {excerpt(right[0]['content'])}",
        )
    check_prompt(left[:shared], "prompt")
    check_answer(left[shared:], "chosen")
    check_answer(right[shared:], "rejected")
    return form, left[:shared], left[shared:], right[shared:]


def ranking(row: Row) -> tuple[PromptContent, list[Any], list[float]]:
    """The prompt, its completions, and the worth of each: its score, or its negative rank (1 is best)."""
    _, prompt = prompt_of(row)
    column, values = find(row, COMPLETIONS)
    completions = [read_answer(value, prompt, f"{column}[{i}]") for i, value in enumerate(read_list(values, column))]
    worth_column, values = find(row, (*SCORES, *RANKS))
    sign = 1.0 if worth_column in SCORES else -1.0
    numbers = enumerate(read_list(values, worth_column))
    worth = [sign * read_number(value, f"{worth_column}[{i}]") for i, value in numbers]
    if len(worth) != len(completions):
        raise UnusableRow(SkipReason.WRONG_TYPE, f"{len(completions)} {column}, but {len(worth)} {worth_column}")
    return prompt, completions, worth
