"""Peak memory and time of a round against its number of samples: flat, because columns are read chunk by chunk.

    python benchmarks/memory.py                        1,000 to 100,000 samples of the tabular family
    python benchmarks/memory.py --samples 2000 40000   others

Each size runs in a process of its own, which reports the peak of its resident memory. One round without evaluation,
8 samples a prompt, 64 prompts a chunk; texts of 200 characters ride along with every prompt, as in a real data set.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

K = 8


def main() -> None:
    arguments = parse()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    found = [apart(samples) for samples in arguments.samples]
    print(f"{'samples':>10} {'seconds':>9} {'peak MB':>9} {'against the first':>18}")
    for row in found:
        ratio = row["megabytes"] / found[0]["megabytes"]
        print(f"{row['samples']:>10,} {row['seconds']:>9.1f} {row['megabytes']:>9.1f} {ratio:>18.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="Sizes of a round.")
    parser.add_argument("--json", help="Also write the table here.")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def apart(samples: int) -> dict[str, Any]:
    """The measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", str(samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def measure(samples: int) -> dict[str, Any]:
    """Runs one round of so many samples in this process."""
    from raftune.config import validate
    from raftune.runtime.assembly import PythonObjects
    from raftune.runtime.run import run

    prompts = samples // K
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.parquet"
        write_prompts(source, prompts)
        config = {
            "output_dir": str(Path(folder) / "run"),
            "num_rounds": 1,
            "prompts_per_round": prompts,
            "data": {"prompts": str(source)},
            "policy": {"family": "tabular", "num_prompts": 16, "num_answers": 32},
            "sampling": {"num_generations": K, "chunk_size": 64},
            "evaluation": {"num_prompts": 0},
            "engine": {"threads": 1},
        }
        began = time.perf_counter()
        run(validate(config), PythonObjects(rewards=[value]))
        seconds = time.perf_counter() - began
    chunk = 1 if sys.platform == "darwin" else 1024  # what the system counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * chunk / 2**20
    return {"samples": samples, "seconds": seconds, "megabytes": peak}


def write_prompts(path: Path, number: int) -> None:
    """Labels with a text beside each, written in pieces so that this weighs nothing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field("prompt", pa.int64()), pa.field("note", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for at in range(0, number, 4096):
            rows = range(at, min(at + 4096, number))
            notes = [f"{row} ".ljust(200, "x") for row in rows]
            writer.write_table(pa.table({"prompt": [row % 16 for row in rows], "note": notes}, schema=schema))


def value(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    """The completion's number."""
    return [float(completion) for completion in completions]


if __name__ == "__main__":
    main()
