"""From human preferences to an aligned model by commands alone, timed: the limit is five minutes on two cores.

    python benchmarks/preferences_to_model.py                      both paths, in a temporary directory
    python benchmarks/preferences_to_model.py --only starter --keep runs/path

starter: the preferences of the bundled generator, by the commands that `raftune starter` itself names.
dialogues: 1,190 rows in the format of HH-RLHF with empty, equal, broken, unended and overlong ones; their prompts are
the prompts of the rounds as well.

Each command is a process of its own, so that its imports count. The exit code is 1 where a command fails or a path
takes longer than the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RAFTUNE = [sys.executable, "-m", "raftune"]
LIMIT = 300.0  # seconds

# The run on the dialogues: as long as the starter's, on longer prompts.
ROUNDS = "--num_rounds 4 --prompts_per_round 64 --sampling.num_generations 8 --sampling.max_completion_length 64"
TUNING = "--training.learning_rate 5e-4 --training.per_device_train_batch_size 16 --training.num_train_epochs 2"
HELD_OUT = "--evaluation.num_prompts 64 --evaluation.num_generations 4 --evaluation.reference_column reference"


def main() -> int:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(arguments.keep or scratch)
        base.mkdir(parents=True, exist_ok=True)
        names = [arguments.only] if arguments.only else list(PATHS)
        found = [travel(name, base / name) for name in names]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(path["seconds"] <= LIMIT for path in found) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PATHS), help="One path only.")
    parser.add_argument("--keep", help="Leave everything in this directory, which must not hold an earlier call's.")
    parser.add_argument("--json", help="Also write the table here.")
    return parser.parse_args()


def travel(name: str, folder: Path) -> dict[str, Any]:
    """Runs one path's commands one after another, and prints what each took and what came of it."""
    print(f"{name}: {folder}", flush=True)
    steps: list[dict[str, Any]] = []
    for words in PATHS[name](folder):
        began = time.perf_counter()
        said = call(words)
        steps.append({"command": words, "seconds": round(time.perf_counter() - began, 2)})
        title = "reward train" if words[0] == "reward" else words[0]
        print(f"  {title:<14}{steps[-1]['seconds']:>8.1f} s   {essence(title, said)}", flush=True)
    total = sum(step["seconds"] for step in steps)
    verdict = "within" if total <= LIMIT else "BEYOND"
    print(f"  {'all':<14}{total:>8.1f} s   {verdict} the limit of {LIMIT:.0f} s, {os.cpu_count()} cores\n", flush=True)
    return {"path": name, "seconds": total, "limit": LIMIT, "steps": steps}


def call(words: list[str]) -> str:
    """What the command says on stdout; exits where it fails."""
    done = subprocess.run([*RAFTUNE, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"raftune {' '.join(words)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def essence(title: str, said: str) -> str:
    """The line of the output that says what came of it."""
    telling = {
        "sft": "perplexity",
        "reward train": "accuracy",
        "train": "best ",
        "evaluate": "held out",
        "compare": "held_out",
        "report": "report",
    }
    lines = [" ".join(line.split()) for line in said.splitlines() if telling.get(title, "rows") in line]
    return lines[0] if lines else ""


def starter(folder: Path) -> list[list[str]]:
    """The commands that `raftune starter` names, after that one itself."""
    began = ["starter", str(folder), "--json"]
    named = json.loads(call(began))["commands"]
    return [command[1:] for command in named]


def dialogues(folder: Path) -> list[list[str]]:
    """The same for a file in the format of HH-RLHF, which holds no prompts of its own."""
    sys.path.insert(0, str(ROOT))
    from tests.hh import write_hh

    folder.mkdir(parents=True)
    written = write_hh(folder / "hh.jsonl.gz")
    print(f"  {written.rows:,} rows, of which {written.rows - written.usable:,} hold no preference")
    data, sft, reward, run, before = (str(folder / name) for name in ("hh.jsonl.gz", "sft", "reward", "run", "before"))
    start = ["--policy.model", f"{sft}/model", "--data.prompts", f"{sft}/prompts.jsonl"]
    judged = [
        "--evaluation.reward_funcs",
        f"{ROOT / 'tests' / 'hh.py'}:judge",
        *HELD_OUT.split(),
        "--engine.threads",
        "1",
    ]
    judged += ["--evaluation.prompts", f"{sft}/held_out.jsonl", "--rewards.reward_funcs", f"{reward}/model"]
    options = [*ROUNDS.split(), *TUNING.split(), "--training.replay_rounds", "2"]
    learning = ["--policy.model", "starter", "--training.learning_rate", "5e-4", "--threads", "1"]
    return [
        ["sft", data, *learning, "--output_dir", sft],
        ["reward", "train", data, "--model", "starter", "--output_dir", reward, "--threads", "1"],
        ["train", *start, *options, *judged, "--output_dir", run],
        ["evaluate", "starter", *judged, "--sampling.max_completion_length", "64", "--output_dir", before],
        ["compare", run, before, "--show", "2"],
        ["report", run],
    ]


PATHS: dict[str, Callable[[Path], list[list[str]]]] = {"starter": starter, "dialogues": dialogues}

if __name__ == "__main__":
    sys.exit(main())
