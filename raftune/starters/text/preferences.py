"""Generates preferences and ratings by a judge that errs.

Everything is a pure function of the split and a seed. The true order is the judge's; a label is swapped with a
probability of NOISE, as people's labels are, and a rating is off by some tenths.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, Final

from raftune.records import Row
from raftune.starters.text.corpus import Split, prompts, read_request, reply, requests_by_domain
from raftune.starters.text.judge import MAXIMUM, parts

NOISE: Final = 0.05  # the share of pairs whose label is swapped
RATING_ERROR: Final = 0.25  # standard deviation of a rating around the judge's score
PROMPTS: Final = 1024
HELD_OUT: Final = 128


def preferences(split: Split, n: int, seed: int = 0) -> list[Row]:
    """`n` rows prompt, chosen, rejected: two replies of different worth to one request, one in twenty mislabelled."""
    rng = Random(seed)
    rows: list[Row] = []
    while len(rows) < n:
        request = rng.choice(rng.choice(requests_by_domain(split)))
        first_score = second_score = 0.0
        while first_score == second_score:
            first, second = reply(request, rng), reply(request, rng)
            first_score, second_score = (parts(request, dialogue.completion)["score"] for dialogue in (first, second))
        chosen, rejected = (first, second) if first_score > second_score else (second, first)
        if rng.random() < NOISE:
            chosen, rejected = rejected, chosen
        rows.append({"prompt": first.prompt, "chosen": chosen.completion, "rejected": rejected.completion})
    return rows


def ratings(split: Split, n: int, seed: int = 0) -> list[Row]:
    """`n` rows prompt, completion, score: the judge's score in [0, 4] with an error, to one decimal."""
    rng = Random(seed)
    rows: list[Row] = []
    while len(rows) < n:
        request = rng.choice(rng.choice(requests_by_domain(split)))
        dialogue = reply(request, rng)
        noisy = parts(request, dialogue.completion)["score"] + rng.gauss(0.0, RATING_ERROR)
        score = round(min(MAXIMUM, max(0.0, noisy)), 1)
        rows.append({"prompt": dialogue.prompt, "completion": dialogue.completion, "score": score})
    return rows


def with_references(split: Split, n: int, seed: int = 0) -> Iterator[Row]:
    """`n` rows prompt, reference: different prompts, each with a good reply."""
    rng = Random(seed)
    for prompt in prompts(split, n, seed):
        request = read_request(prompt)
        assert request is not None, prompt
        yield {"prompt": prompt, "reference": reply(request, rng, ["good"]).completion}


def write_starter(folder: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Writes example data and a configuration, and returns the number of rows of each data file.

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
    counts = {name: write_lines(content, folder / name) for name, content in files.items()}
    template = (Path(__file__).parent / "aligned.yaml").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(template.replace("DIR", str(folder).replace("'", "''")), encoding="utf-8")
    return counts


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes the rows as JSON lines, and returns how many there were."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    return len(lines)
