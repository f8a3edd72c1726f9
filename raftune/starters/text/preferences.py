"""Generates preferences and ratings by a judge that errs.

Everything is a pure function of the split and a seed. The true order is the judge's; a label is turned round with a
probability of NOISE, as people's labels are, and a rating is off by some tenths.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from raftune.records import Row
from raftune.starters.text.corpus import Dialogue, Request, Split, prompts, read_request, reply, requests
from raftune.starters.text.judge import MAXIMUM, parts
from raftune.starters.text.topics import DOMAINS

NOISE: Final = 0.05  # the share of pairs whose label is turned round
RATING_ERROR: Final = 0.25  # standard deviation of a rating around the judge's score
PROMPTS: Final = 1024
HELD_OUT: Final = 128
REFERENCES: Final = ("good",)  # the kind of reply that a reference answer is


def preferences(split: Split, n: int, seed: int = 0) -> list[Row]:
    """`n` rows prompt, chosen, rejected: two replies of different worth to one request, one in twenty mislabelled."""
    rng = Random(seed)
    by_domain = [[r for r in requests(split) if r.domain == name] for name in DOMAINS]
    found = []
    for _ in range(n):
        request = rng.choice(rng.choice(by_domain))
        better, worse = two_replies(request, rng)
        if rng.random() < NOISE:
            better, worse = worse, better
        found.append({"prompt": better.prompt, "chosen": better.completion, "rejected": worse.completion})
    return found


def two_replies(request: Request, rng: Random) -> tuple[Dialogue, Dialogue]:
    """Two replies that the judge tells apart, the better one first, both to the first one's prompt."""
    while True:
        first, second = reply(request, rng), reply(request, rng)
        left, right = (parts(request, one.completion)["score"] for one in (first, second))
        if left != right:
            second = second._replace(prompt=first.prompt)
            return (first, second) if left > right else (second, first)


def ratings(split: Split, n: int, seed: int = 0) -> list[Row]:
    """`n` rows prompt, completion, score: the judge's score in [0, 4] with an error, to one decimal."""
    rng = Random(seed)
    by_domain = [[r for r in requests(split) if r.domain == name] for name in DOMAINS]
    found = []
    for _ in range(n):
        request = rng.choice(rng.choice(by_domain))
        one = reply(request, rng)
        noisy = parts(request, one.completion)["score"] + rng.gauss(0.0, RATING_ERROR)
        score = round(min(MAXIMUM, max(0.0, noisy)), 1)
        found.append({"prompt": one.prompt, "completion": one.completion, "score": score})
    return found


def with_references(split: Split, n: int, seed: int = 0) -> Iterator[Row]:
    """`n` rows prompt, reference: different prompts, each with a good reply."""
    rng = Random(seed)
    for prompt in prompts(split, n, seed):
        request = read_request(prompt)
        assert request is not None, prompt
        yield {"prompt": prompt, "reference": reply(request, rng, REFERENCES).completion}


def write_starter(folder: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Writes everything that one begins with, and returns the number of rows of each file of them.

    preferences.jsonl and ratings.jsonl have `rows` rows each; prompts.jsonl and held_out.jsonl share no request;
    run.yaml is a run on what `raftune sft` and `raftune reward train` make of them in this folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Iterable[Row]] = {
        "preferences.jsonl": preferences("train", rows, seed),
        "ratings.jsonl": ratings("train", rows, seed),
        "prompts.jsonl": ({"prompt": prompt} for prompt in prompts("train", PROMPTS, seed)),
        "held_out.jsonl": with_references("heldout", HELD_OUT, seed),
    }
    counts = {name: write_lines(found, folder / name) for name, found in files.items()}
    template = (Path(__file__).parent / "aligned.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(template.replace("DIR", str(folder).replace("'", "''")), encoding="utf-8")
    return counts


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes the rows as JSON lines, and returns how many there were."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count
