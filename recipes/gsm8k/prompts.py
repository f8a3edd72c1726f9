"""Writes GSM8K as prompts for a chat model: train.jsonl and test.jsonl, each line a question and its solution.

python recipes/gsm8k/prompts.py FOLDER      (once, with network)
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


def write(folder: Path) -> None:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        found = datasets.load_dataset("openai/gsm8k", "main", split=split)
        lines = [json.dumps(row(one["question"], one["answer"]), ensure_ascii=False) + "\n" for one in found]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(lines):,} prompts")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "gsm8k"))
