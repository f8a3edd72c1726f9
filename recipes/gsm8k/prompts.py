"""Writes GSM8K as prompts for a chat model: train.jsonl and test.jsonl, each line a question and its solution.

python recipes/gsm8k/prompts.py FOLDER                  (once, with network)
python recipes/gsm8k/prompts.py FOLDER ROWS.jsonl       (of a file of your own: each line a question and an answer)

Of a file every tenth row is written to test.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ASKED = "Reason step by step. Put the final number into \\boxed{}."


def row(question: str, answer: str) -> dict[str, Any]:
    """The question as a message; the solution, which ends in `#### 42`, is what the reward compares with."""
    return {"prompt": [{"role": "user", "content": f"{question.strip()}\n\n{ASKED}"}], "answer": answer}


def splits(source: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Questions and answers by split: of the file, or of the data set on the hub."""
    if source is not None:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        if bad := [number for number, one in enumerate(rows, 1) if not {"question", "answer"} <= {*one}]:
            sys.exit(f"{source}: row {bad[0]} must have a question and an answer.")
        return {
            "train": [one for number, one in enumerate(rows) if number % 10 != 9],
            "test": [one for number, one in enumerate(rows) if number % 10 == 9],
        }
    import datasets

    return {name: [*datasets.load_dataset("openai/gsm8k", "main", split=name)] for name in ("train", "test")}


def write(folder: Path, source: Path | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in splits(source).items():
        lines = [json.dumps(row(one["question"], one["answer"]), ensure_ascii=False) + "\n" for one in found]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(lines):,} prompts")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "gsm8k"), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
