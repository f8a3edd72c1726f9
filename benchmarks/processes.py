"""Seconds of an optimizer step with one process and with several, on the same rows, steps and threads.

    python benchmarks/processes.py MODEL --processes 2 --threads 2 [--parallel fsdp] [--lora]

Steps are timed between two callbacks of progress, without start-up, which is a line of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raftune.config import RunConfig, validate
from raftune.engines.training import train_in_processes
from raftune.policies.causal_lm import CausalLM
from raftune.runtime.distributed import task_of


def write_rows(path: Path, rows: int, tokens: int, vocabulary: int) -> None:
    random = np.random.default_rng(0)
    ids = [random.integers(100, vocabulary, tokens).tolist() for _ in range(rows)]
    texts = {name: [f"{name} {i}" for i in range(rows)] for name in ("sample_id", "prompt_id", "prompt")}
    fixed = {"weight": [1.0] * rows, "finish": ["eos"] * rows}
    pq.write_table(pa.table({**texts, **fixed, "completion_ids": ids}), path)


def timed(config: RunConfig, processes: int, root: Path) -> dict[str, float]:
    """Seconds of a step (the mean of all but the first three), and from the start to the end of the first one."""
    start, out = root / "start", root / f"out-{processes}"
    times: list[tuple[int, float]] = []
    begun = time.perf_counter()
    task = task_of(config, start, start, root / "rows.parquet", root / f"work-{processes}", out)

    def progress(done: int, of: int) -> None:
        times.append((done, time.perf_counter()))

    train_in_processes(task, processes, config.engine.threads // processes, root / "log", progress)
    first = next(pair for pair in times if pair[0] > 3)
    step = (times[-1][1] - first[1]) / (times[-1][0] - first[0])
    return {"step": step, "start": first[1] - begun - first[0] * step, "whole": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parallel", default="ddp")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    adapter = {"adapter": {"r": 16}} if given.lora else {}
    config = validate(
        {
            "data": {"prompts": "-"},
            "policy": {"model": given.model, **adapter},
            "training": {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": given.processes,
                "max_steps": given.steps,
                "parallel": given.parallel,
            },
            "engine": {"threads": given.threads},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        facts = CausalLM.start(config, root / "start")
        write_rows(root / "rows.parquet", 8 * given.processes, given.tokens, facts["vocabulary"])
        results = {count: timed(config, count, root) for count in (1, given.processes)}
    ratio = results[1]["step"] / results[given.processes]["step"]
    print(json.dumps({**vars(given), "results": results, "times_faster": ratio}, indent=2))


if __name__ == "__main__":
    main()
