"""Generates a corpus of requests and replies, about two thirds of them bad, from the phrases of `topics.json`.

The text format is "User: REQUEST", a line break, and "Assistant: REPLY". Everything is a pure function of a seed. A
request (domain, way of asking, topic, day) belongs to exactly one split, by a hash of its words: held-out requests were
never seen in training, though their topics were.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, Final, Literal, NamedTuple

from raftune.errors import DataError

Split = Literal["train", "heldout"]

GREETINGS: Final = ("", "Hi! ", "Hello! ", "Excuse me. ", "Quick question. ", "Good morning. ")
HELDOUT_SHARE: Final = 6  # one request in six of every domain is held out

_PHRASES: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "topics.json").read_text(encoding="utf-8"))
DAYS: Final[tuple[str, ...]] = tuple(_PHRASES["days"])
RUDE: Final[list[str]] = _PHRASES["rude"]
CURT: Final[list[str]] = _PHRASES["curt"]
DIGRESSIONS: Final[list[str]] = _PHRASES["digressions"]


class Domain(NamedTuple):
    """One kind of request: how people ask, the courtesies, and three pieces of right advice for each of eight topics.

    In every text `{t}` stands for the topic, `{d}` for a day of the week, and in openers `{r}` for the topic as a reply
    says it (`said`: "your {t}").
    """

    asks: list[str]
    said: str
    openers: list[str]
    closers: list[str]
    topics: dict[str, list[str]]


DOMAINS: Final = {
    name: Domain(
        domain["asks"],
        domain["said"],
        domain["openers"] if "openers" in domain else [*_PHRASES["openers"], domain["opener"]],
        [*_PHRASES["closers"], domain["closer"]],
        domain["topics"],
    )
    for name, domain in _PHRASES["domains"].items()
}


class Request(NamedTuple):
    """What a person asks, without the greeting. `day` is empty where the domain knows no days."""

    domain: str
    ask: str
    topic: str
    day: str

    @property
    def text(self) -> str:
        return self.ask.format(t=self.topic, d=self.day)

    @property
    def said(self) -> str:
        """The topic as a reply says it, such as "your bicycle"."""
        return DOMAINS[self.domain].said.format(t=self.topic)

    @property
    def advice(self) -> tuple[str, ...]:
        """The three pieces of right advice."""
        return tuple(tip.format(d=self.day) for tip in DOMAINS[self.domain].topics[self.topic])

    @property
    def split(self) -> Split:
        return _splits()[self]


class Dialogue(NamedTuple):
    """A request, one reply to it, and what kind of reply it is."""

    prompt: str
    completion: str
    kind: str


def as_prompt(text: str) -> str:
    """What the policy reads; the reply follows at once, beginning with a space."""
    return f"User: {text}\nAssistant:"


@cache
def _splits() -> dict[Request, Split]:
    """The split of every request: of each domain, the sixth with the lowest hashes is held out."""
    splits: dict[Request, Split] = {}
    for name, domain in DOMAINS.items():
        requests_of_domain = [
            Request(name, ask, topic, day)
            for ask in domain.asks
            for topic in domain.topics
            for day in (DAYS if "{d}" in ask else ("",))
        ]
        by_hash = sorted(requests_of_domain, key=lambda request: blake2b(request.text.encode(), digest_size=8).digest())
        held_out = set(by_hash[: len(by_hash) // HELDOUT_SHARE])
        splits |= {request: "heldout" if request in held_out else "train" for request in requests_of_domain}
    return splits


@cache
def requests(split: Split) -> tuple[Request, ...]:
    """Every request of the split, in a fixed order."""
    return tuple(request for request, its_split in _splits().items() if its_split == split)


@cache
def requests_by_domain(split: Split) -> tuple[tuple[Request, ...], ...]:
    """The requests of the split, one tuple a domain."""
    return tuple(tuple(request for request in requests(split) if request.domain == name) for name in DOMAINS)


def prompts(split: Split, n: int, seed: int = 0) -> list[str]:
    """`n` different prompts of the split, every domain about equally often.

    Raises DataError if the split has fewer than `n`.
    """
    available = len(requests(split)) * len(GREETINGS)
    if n > available:
        raise DataError(f"n must be at most {available} for the split {split!r}; got {n}: there are no more prompts.")
    rng = Random(seed)
    sampled: dict[str, None] = {}
    while len(sampled) < n:
        request = rng.choice(rng.choice(requests_by_domain(split)))
        sampled.setdefault(as_prompt(rng.choice(GREETINGS) + request.text))
    return list(sampled)


@cache
def _by_text() -> dict[str, Request]:
    return {request.text: request for request in _splits()}


def read_request(prompt: str) -> Request | None:
    """The request that a prompt holds, or None if this generator did not make it."""
    text = prompt.strip().removeprefix("User:").removesuffix("Assistant:").strip()
    bare = (text.removeprefix(greeting.strip()).strip() for greeting in GREETINGS)
    return next((_by_text()[words] for words in bare if words in _by_text()), None)


def opener(request: Request, rng: Random) -> str:
    return rng.choice(DOMAINS[request.domain].openers).format(r=request.said)


def closer(request: Request, rng: Random) -> str:
    return rng.choice(DOMAINS[request.domain].closers)


def advice(request: Request, rng: Random) -> str:
    """One piece of advice, or in three cases of ten two different ones."""
    return " ".join(rng.sample(request.advice, 2 if rng.random() < 0.3 else 1))


# The kinds of reply and the share of each.
KINDS: Final[dict[str, float]] = {
    "good": 0.11,
    "advice": 0.10,
    "half_polite": 0.08,
    "empty_courtesy": 0.08,
    "rude": 0.18,
    "rude_advice": 0.07,
    "curt": 0.12,
    "ramble": 0.14,
    "wrong_advice": 0.07,
    "unfinished": 0.05,
}


def _reply_of_kind(kind: str, request: Request, rng: Random) -> str:
    if kind == "good":
        return f"{opener(request, rng)} {advice(request, rng)} {closer(request, rng)}"
    if kind == "advice":
        return advice(request, rng)
    if kind == "half_polite":
        text = advice(request, rng)
        return f"{opener(request, rng)} {text}" if rng.random() < 0.5 else f"{text} {closer(request, rng)}"
    if kind == "empty_courtesy":
        return f"{opener(request, rng)} {closer(request, rng)}"
    if kind == "rude":
        return " ".join(line.format(r=request.said) for line in rng.sample(RUDE, rng.choice((1, 2, 2))))
    if kind == "rude_advice":
        parts = [rng.choice(RUDE).format(r=request.said), advice(request, rng)]
        rng.shuffle(parts)
        return " ".join(parts)
    if kind == "curt":
        return rng.choice(CURT)
    if kind == "ramble":
        lines = rng.sample(DIGRESSIONS, rng.choice((1, 2, 2, 3)))
        return " ".join([opener(request, rng), *lines] if rng.random() < 0.3 else lines)
    if kind == "wrong_advice":
        other = rng.choice([topic for topic in DOMAINS[request.domain].topics if topic != request.topic])
        text = advice(request._replace(topic=other), rng)
        return f"{opener(request, rng)} {text} {closer(request, rng)}" if rng.random() < 0.5 else text
    words = _reply_of_kind("good", request, rng).split()  # unfinished
    return " ".join(words[: rng.randrange(4, len(words) - 1)]).rstrip(".!?")


def reply(request: Request, rng: Random, kinds: Sequence[str] | None = None) -> Dialogue:
    """One dialogue about the request; the kind of reply is sampled by the shares in KINDS, if given among `kinds`."""
    names = list(kinds or KINDS)
    kind = rng.choices(names, [KINDS[name] for name in names])[0]
    prompt = as_prompt(rng.choice(GREETINGS) + request.text)
    return Dialogue(prompt, " " + _reply_of_kind(kind, request, rng), kind)


def dialogues(n: int, seed: int = 0, split: Split = "train", kinds: Sequence[str] | None = None) -> Iterator[Dialogue]:
    """`n` dialogues of the split; every domain comes equally often, whatever its number of requests."""
    rng = Random(seed)
    for _ in range(n):
        yield reply(rng.choice(rng.choice(requests_by_domain(split))), rng, kinds)
