"""The text judge: rates a reply from 0 to 4 by rules. Never trained on.

    score = form x max(0, 2 help + courtesy + topic)

- help, 0..1: how nearly one sentence is one of the three right pieces of advice for this very topic (and day), by the
  longest common subsequence of words; full from 90 % on, nothing up to 50 %.
- courtesy, -1..1: half for a courteous first or middle sentence, half for a courteous last one; -1 if anything is rude.
- topic, 0..1: share of the request's slots (topic, day) that the reply names.
- form, 0..1: the product of an ending with a full stop (else 1/2), a length of 8 to 45 words, the share of three-word
  runs that are not repeats, and the share of sentences that belong (advice, two courtesies, a mention of the topic).

Repeats, stuffed courtesies, digressions and advice for another topic lower the form, and so all of the score.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from raftune.starters.text.corpus import Request, read_request

MAXIMUM: Final = 4.0
MIN_WORDS: Final = 8
MAX_WORDS: Final = 45

_COURTEOUS: Final = re.compile(
    r"\b(happy|glad|gladly|of course|thank you|please|sure|certainly|pleasure|welcome|good question|fine question|sorry"
    r"|apologize|hope|enjoy|have a|let me|lucky you|how lovely|how kind|what a tasty|no problem|i understand"
    r"|never too late|good luck|see you|stay safe|have fun|you can do this|happy day|come back|amazing|i like)\b",
    re.IGNORECASE,
)
_RUDE: Final = re.compile(
    r"\b(figure it out|silly|better things to do|would i care|nobody cares|do not care|not care|child knows|wasting"
    r"|waste my|really asking|joking|bother|your own head|boring|not my problem)\b",
    re.IGNORECASE,
)


def judge(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """One score in [0, 4] for each completion; None where the prompt is not one of the generator's.

    Columns are ignored. Prompts and completions are strings or lists of messages, whose last content counts.
    """
    requests = [read_request(_text(prompt)) for prompt in prompts]
    return [
        None if request is None else parts(request, _text(completion))["score"]
        for request, completion in zip(requests, completions, strict=True)
    ]


def parts(request: Request, completion: str) -> dict[str, float]:
    """The four parts of the score, and the score itself, of one completion."""
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", completion.strip()) if sentence]
    helps = [_advice(request, _words(sentence)) for sentence in sentences]
    slots = [slot for slot in (request.topic, request.day) if slot]
    topic = sum(_names(slot, completion) for slot in slots) / len(slots)
    courtesy = -1.0
    if not _RUDE.search(completion):
        *body, last = sentences or [""]
        courtesy = 0.5 * any(map(_COURTEOUS.search, body)) + 0.5 * bool(_COURTEOUS.search(last))

    form, words = 0.0, _words(completion)
    if words:
        ended = 1.0 if completion.rstrip().endswith((".", "!", "?")) else 0.5
        length = min(1.0, len(words) / MIN_WORDS, MAX_WORDS / len(words))
        runs = list(zip(words, words[1:], words[2:], strict=False))
        fresh = len(set(runs)) / len(runs) if runs else 1.0
        courtesies, belonging = 0, 0
        for sentence, help_of_sentence in zip(sentences, helps, strict=True):
            if _RUDE.search(sentence):
                continue
            if help_of_sentence > 0:
                belonging += 1
            elif _COURTEOUS.search(sentence):
                courtesies += 1
                belonging += courtesies <= 2
            else:
                belonging += _names(request.topic, sentence)
        form = ended * length * fresh * (belonging / len(sentences))
    best = max(helps, default=0.0)
    score = form * max(0.0, 2.0 * best + courtesy + topic)
    return {"help": best, "courtesy": courtesy, "topic": topic, "form": form, "score": score}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value[-1].get("content") or "") if value else ""


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _names(slot: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(slot)}\b", text, re.IGNORECASE) is not None


def _advice(request: Request, words: list[str]) -> float:
    """How nearly the sentence is one of the topic's pieces of advice, 0..1, by the longest common subsequence."""
    likeness = 0.0
    for tip in map(_words, request.advice):
        row = [0] * (len(tip) + 1)
        for word in words:
            before, row = row, [0]
            for j, other in enumerate(tip):
                row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
        likeness = max(likeness, row[-1] / max(len(words), len(tip)))
    return min(1.0, max(0.0, (likeness - 0.5) / 0.4))
