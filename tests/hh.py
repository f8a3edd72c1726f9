"""A file in the format of HH-RLHF with everything that such files hold, and what a reader must make of each line.

python -m tests.hh FILE.jsonl[.gz] [SEED]
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from raftune.starters.text.corpus import GREETINGS, Request, as_prompt, reply, requests
from raftune.starters.text.judge import judge as ground_truth

NOISE = 0.05
Turns = list[tuple[str, str]]
MARKS = (
    "שלום, מה שלומך?",
    "مرحبا كيف حالك",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "naïve cafe\u0301",
    "日本語です。",
    "zero\u200bwidth",
    "line\u2028break",
    "𝕎ide",
)


@dataclass(frozen=True)
class Awkward:
    """What was written: `rows` lines that are not blank, and for each reason the lines that must be skipped for it."""

    path: Path
    rows: int
    skipped: dict[str, tuple[int, ...]]
    long_prompts: tuple[int, ...]  # lines whose prompt is longer than any small model reads
    long_answers: tuple[int, ...]

    @property
    def usable(self) -> int:
        return self.rows - sum(map(len, self.skipped.values()))


@dataclass(frozen=True)
class Line:
    """A line as bytes, and what becomes of it: the reason to skip it, `long prompt`, `long answer`, or nothing."""

    content: bytes
    fate: str = ""


def text(turns: Turns) -> str:
    return "".join(f"\n\n{who}: {words}" for who, words in turns)


def row(chosen: Any, rejected: Any, **more: Any) -> bytes:
    return json.dumps({"chosen": chosen, "rejected": rejected, **more}, ensure_ascii=False).encode()


def random_request(rng: Random) -> Request:
    return rng.choice(requests("train"))


def human(request: Request, rng: Random) -> tuple[str, str]:
    return "Human", rng.choice(GREETINGS) + request.text


def assistant(request: Request, rng: Random, *kinds: str) -> tuple[str, str]:
    return "Assistant", reply(request, rng, kinds or None).completion.strip()


def exchange(rng: Random, turns: int = 1) -> tuple[Turns, str, str]:
    """A dialogue up to the last question, a good answer and a bad one; in one of twenty, the other way round."""
    before: Turns = []
    for _ in range(turns - 1):
        request = random_request(rng)
        before += [human(request, rng), assistant(request, rng)]
    request = random_request(rng)
    good, bad = assistant(request, rng, "good", "advice"), assistant(request, rng, "rude", "curt", "ramble")
    if rng.random() < NOISE:
        good, bad = bad, good
    return [*before, human(request, rng)], good[1], bad[1]


def pair(prompt: Turns, chosen: str, rejected: str) -> bytes:
    return row(text([*prompt, ("Assistant", chosen)]), text([*prompt, ("Assistant", rejected)]))


# --- the kinds of lines: how many, and a function that makes one ---


def plain(rng: Random) -> Line:
    return Line(pair(*exchange(rng)))


def several_turns(rng: Random) -> Line:
    return Line(pair(*exchange(rng, rng.choice((2, 2, 3)))))


def parts_early(rng: Random) -> Line:
    """The dialogues part at the first answer and go on for different lengths."""
    prompt, good, bad = exchange(rng)
    later, more, _ = exchange(rng)
    return Line(
        row(text([*prompt, ("Assistant", good), *later, ("Assistant", more)]), text([*prompt, ("Assistant", bad)]))
    )


def of_all_scripts(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    mark = rng.choice(MARKS)
    prompt = [*prompt[:-1], ("Human", f"{prompt[-1][1]} {mark}")]
    content = pair(prompt, f"{good} {mark}", bad)
    return Line(content if rng.random() < 0.5 else json.dumps(json.loads(content)).encode())  # as it is, or as \\u…


def carriage_returns(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    chosen, rejected = (text([*prompt, ("Assistant", a)]).replace("\n", "\r\n") for a in (good, bad))
    return Line(row(chosen, rejected) + b"\r")


def long_prompt(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    return Line(pair([("Human", f"{prompt[-1][1]} {'and so on ' * 4000}")], good, bad), "long prompt")


def long_completion(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    return Line(pair(prompt, good + " And again." * 4000, bad), "long answer")


def empty_completion(rng: Random) -> Line:
    prompt, good, _ = exchange(rng)
    answers = (good, rng.choice(("", "  ", "\n")))
    return Line(pair(prompt, *(answers if rng.random() < 0.5 else answers[::-1])), "empty answer")


def same_completion(rng: Random) -> Line:
    prompt, good, _ = exchange(rng, rng.choice((1, 2)))
    return Line(pair(prompt, good, good + rng.choice(("", " ", "\n"))), "chosen equal to rejected")


def other_prompt(rng: Random) -> Line:
    (left, good, _), (right, _, bad) = exchange(rng), exchange(rng)
    left = [("Human", "First of all: " + left[-1][1])]
    return Line(row(text([*left, ("Assistant", good)]), text([*right, ("Assistant", bad)])), "no shared prefix")


def no_turns(rng: Random) -> Line:
    _, good, bad = exchange(rng)
    return Line(row(good, bad), "no shared prefix")


def ends_with_human(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    rest = [("Human", "Thank you!")]
    chosen, rejected = ([*prompt, ("Assistant", a), *rest] for a in (good, bad))
    return Line(row(text(chosen), text(rejected)), "dialogue does not end with the assistant")


def out_of_order(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    before = rng.choice(([("Assistant", "Welcome.")], [("Human", "Hello?")], [("Assistant", "A"), ("Assistant", "B")]))
    return Line(pair([*before, *prompt], good, bad), "roles out of order")


def empty_prompt(rng: Random) -> Line:
    _, good, bad = exchange(rng)
    return Line(pair([("Human", rng.choice(("", "   ")))], good, bad), "empty prompt")


def broken(rng: Random) -> Line:
    content = plain(rng).content
    bad = rng.choice(
        (content[: len(content) // 2], content[:-1], content[:20] + b"\xff\xfe" + content[20:], b"chosen,rejected")
    )
    return Line(bad, "broken line")


def half_a_surrogate(rng: Random) -> Line:
    prompt, good, bad = exchange(rng)
    return Line(pair(prompt, good + "@@", bad).replace(b"@@", b"\\ud83d"), "broken line")


def missing_key(rng: Random) -> Line:
    whole = json.loads(plain(rng).content)
    whole[rng.choice(("chosen", "rejected"))] = None
    kept = {name: value for name, value in whole.items() if value is not None or rng.random() < 0.5}
    return Line(json.dumps(kept).encode(), "missing column")


def wrong_type(rng: Random) -> Line:
    good = json.loads(plain(rng).content)["chosen"]
    return Line(
        rng.choice((row(good, 3), row(good, [good]), row(["a"], ["b"]), b'["chosen", "rejected"]', b"17")), "wrong type"
    )


KINDS: tuple[tuple[int, Callable[[Random], Line]], ...] = (
    *((560, plain), (360, several_turns), (24, parts_early), (64, of_all_scripts), (20, carriage_returns)),
    *(
        (12, long_prompt),
        (14, long_completion),
        (21, empty_completion),
        (19, same_completion),
        (13, other_prompt),
        (5, no_turns),
    ),
    *((11, ends_with_human), (17, out_of_order), (6, empty_prompt), (16, broken), (3, half_a_surrogate)),
    *((15, missing_key), (10, wrong_type)),
)


def lines(seed: int, share: float) -> Iterator[Line]:
    rng = Random(seed)
    made = [make(rng) for count, make in KINDS for _ in range(max(1, round(count * share)))]
    rng.shuffle(made)
    return iter(made)


def write_hh(path: Path, seed: int = 0, share: float = 1.0) -> Awkward:
    """Writes the file: 1,190 lines, or a share of each kind, with a mark at the beginning and blank lines between."""
    rng = Random(seed + 1)
    content, fates, number = [b"\xef\xbb\xbf"], [], 0
    for line in lines(seed, share):
        blanks = rng.random() < 0.02
        content += [b"\n", b"  \r\n"] if blanks else []
        number += 2 * blanks + 1
        content += [line.content, b"\r\n" if rng.random() < 0.1 else b"\n"]
        fates.append((number, line.fate))
    whole = b"".join(content[:-1])  # no line end at the end
    path.write_bytes(gzip.compress(whole, mtime=0) if path.suffix == ".gz" else whole)

    def of(fate: str) -> tuple[int, ...]:
        return tuple(number for number, found in fates if found == fate)

    reasons = sorted({fate for _, fate in fates} - {"", "long prompt", "long answer"})
    return Awkward(path, len(fates), {reason: of(reason) for reason in reasons}, of("long prompt"), of("long answer"))


def judge(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """The starter's judge on the last question of each dialogue; None where that is none of the generator's."""
    asked_last = [prompt.rsplit("Human:", 1)[-1].removesuffix("Assistant:").strip() for prompt in prompts]
    found: list[float | None] = ground_truth([as_prompt(words) for words in asked_last], completions)
    return found


if __name__ == "__main__":
    written = write_hh(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{written.path}: {written.rows:,} rows, of which {written.usable:,} usable")
