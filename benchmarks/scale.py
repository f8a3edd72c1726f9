"""Workers: what two give over one, what a chunk costs beyond its work, and the memory of 100,000 prompts.

    python benchmarks/scale.py workers     one and two workers, local and Ray, on the bundled model (about two minutes)
    python benchmarks/scale.py large       100,000 prompts x K = 8 in one round of the tabular family, local and Ray

Times are those of the stage in events.jsonl, start-up apart: `workers` times the second of two rounds, in which every
worker is running. Memory is the largest resident size of the driver, and of all its workers together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["workers", "large"])
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--engines", default="local 1,local 2,ray 1,ray 2", help="of `workers`; `large` takes two")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.engines.split(","):
            kind, workers = name.split()
            engine: dict[str, Any] = {"kind": kind, "workers": int(workers), "threads": 1}
            if kind == "ray":
                engine["address"] = "local"
            root = Path(folder) / name.replace(" ", "-")
            (workers_of if options.part == "workers" else large)(root, engine, options.prompts, name)


def workers_of(root: Path, engine: dict[str, Any], prompts: int, name: str) -> None:
    """Two rounds of 256 prompts x 8 of the starter, in 16 chunks; the second is timed."""
    import raftune

    raftune.run(
        {
            "output_dir": str(root),
            "num_rounds": 2,
            "prompts_per_round": 256,
            "report": False,
            "data": {"prompts": "starter"},
            "policy": {"family": "causal_lm", "model": "starter"},
            "sampling": {"num_generations": 8, "chunk_size": 16, "max_completion_length": 48},
            "rewards": {"reward_funcs": ["starter:judge"]},
            "training": {"max_steps": 1},
            "evaluation": {"num_prompts": 0},
            "guards": {"enabled": False},
            "engine": engine,
        }
    )
    print(f"{name}: {stage_words(root, 2, 'generate', engine['workers'])}", flush=True)


def stage_words(root: Path, round_: int, name: str, workers: int) -> str:
    """The time of a stage and its chunks, and what a chunk costs a worker beyond its own time."""
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    stage = [e for e in events if e.get("round") == round_ and e.get("stage") == name]
    seconds = next(e["seconds"] for e in stage if e["event"] == "stage_end")
    chunks = [e["seconds"] for e in stage if e["event"] == "chunk"]
    beyond = (seconds * workers - sum(chunks)) / len(chunks) * 1e3
    return f"{name} {seconds:.2f} s; {len(chunks)} chunks of {statistics.median(chunks):.3f} s, {beyond:.1f} ms beyond"


def large(root: Path, engine: dict[str, Any], prompts: int, name: str) -> None:
    """One round of the tabular family, without training on a language model: the loop itself."""
    import pyarrow as pa

    from raftune.config import validate
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    reward = root.parent / "reward.py"
    reward.write_text("def value(prompts, completions, **columns):\n    return [float(c) for c in completions]\n")
    config = validate(
        {
            "output_dir": str(root),
            "num_rounds": 1,
            "prompts_per_round": prompts,
            "report": False,
            "data": {"prompts": "given as an object"},
            "policy": {"family": "tabular", "num_prompts": 100, "num_answers": 50},
            "sampling": {"num_generations": 8, "chunk_size": 512},
            "rewards": {"reward_funcs": [f"{reward}:value"]},
            "evaluation": {"num_prompts": 0},
            "guards": {"enabled": False},
            "engine": engine,
        }
    )
    rows = pa.table({"prompt": [i % 100 for i in range(prompts)]})
    began = time.perf_counter()
    with watching() as most:
        run(config, PythonObjects(train=lambda: rows))
    events = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    stages = {e["stage"]: e["seconds"] for e in events if e["event"] == "stage_end" and e["round"] == 1}
    print(f"{name}: {time.perf_counter() - began:.0f} s, {most['driver'] / MIB:.0f} MiB in the driver, ", end="")
    print(f"{most['workers'] / MIB:.0f} MiB in its {most['count']} other processes", flush=True)
    print(f"  {stage_words(root, 1, 'score', engine['workers'])}")
    print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in stages.items()), flush=True)


@contextlib.contextmanager
def watching() -> Iterator[dict[str, int]]:
    """The most memory that this process, and that all processes below it, had inside the block, in bytes."""
    most, over, me = {"driver": 0, "workers": 0, "count": 0}, threading.Event(), psutil.Process()

    def watch() -> None:
        while not over.wait(0.2):
            with contextlib.suppress(psutil.Error):
                most["driver"] = max(most["driver"], me.memory_info().rss)
                below = [child.memory_info().rss for child in me.children(recursive=True)]
                most["workers"], most["count"] = max(most["workers"], sum(below)), max(most["count"], len(below))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
