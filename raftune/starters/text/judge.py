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
    pairs = zip(prompts, completions, strict=True)
    return [_score(read_request(_text(prompt)), _text(completion)) for prompt, completion in pairs]


def parts(request: Request, completion: str) -> dict[str, float]:
    """The four parts of the score, and the score itself, of one completion."""
    sentences = [_words(sentence) for sentence in _sentences(completion)]
    helps = max((_advice(request, words) for words in sentences), default=0.0)
    courtesy, topic, form = _courtesy(completion), _topic(request, completion), _form(request, completion)
    score = form * max(0.0, 2.0 * helps + courtesy + topic)
    return {"help": helps, "courtesy": courtesy, "topic": topic, "form": form, "score": score}


def _score(request: Request | None, completion: str) -> float | None:
    return None if request is None else parts(request, completion)["score"]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value[-1].get("content") or "") if value else ""


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _common(left: list[str], right: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        before = row
        row = [0]
        for j, other in enumerate(right):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def _advice(request: Request, words: list[str]) -> float:
    """How nearly the sentence is one of the topic's pieces of advice, 0..1."""
    tips = [_words(tip) for tip in request.advice]
    likeness = max(_common(words, tip) / max(len(words), len(tip)) for tip in tips)
    return min(1.0, max(0.0, (likeness - 0.5) / 0.4))


def _courtesy(completion: str) -> float:
    if _RUDE.search(completion):
        return -1.0
    *body, last = _sentences(completion) or [""]
    return 0.5 * any(_COURTEOUS.search(line) for line in body) + 0.5 * bool(_COURTEOUS.search(last))


def _topic(request: Request, completion: str) -> float:
    slots = [slot for slot in (request.topic, request.day) if slot]
    return sum(_names(slot, completion) for slot in slots) / len(slots)


def _names(slot: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(slot)}\b", text, re.IGNORECASE) is not None


def _form(request: Request, completion: str) -> float:
    words = _words(completion)
    if not words:
        return 0.0
    ended = 1.0 if completion.rstrip().endswith((".", "!", "?")) else 0.5
    length = min(1.0, len(words) / MIN_WORDS, MAX_WORDS / len(words))
    return ended * length * _freshness(words) * _belonging(request, completion)


def _freshness(words: list[str]) -> float:
    """The share of three-word runs that did not occur before."""
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) if runs else 1.0


def _belonging(request: Request, completion: str) -> float:
    """The share of sentences that belong to a good reply to this request."""
    sentences = _sentences(completion)
    courtesies, belong = 0, 0
    for sentence in sentences:
        if _RUDE.search(sentence):
            continue
        if _advice(request, _words(sentence)) > 0:
            belong += 1
        elif _COURTEOUS.search(sentence):
            courtesies += 1
            belong += courtesies <= 2
        else:
            belong += _names(request.topic, sentence)
    return belong / len(sentences)
