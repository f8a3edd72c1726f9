"""Arms of a benchmark, two at a time, each in a process of its own with one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

THREADS, PROCESSES = 1, 2  # what a run computes depends on its threads
LAST = 3000  # characters of what a failed arm said


def run_side_by_side(script: str, jobs: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Calls the script once for each job, a name and the words it is called with; says how far it is.

    Exits with what an arm said where it failed.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(PROCESSES) as pool:
        for count, words in enumerate(pool.map(lambda job: call(script, *job), jobs), 1):
            print(f"{count}/{len(jobs)} {words}, {time.monotonic() - began:.0f} s in all", file=sys.stderr, flush=True)


def call(script: str, name: str, words: Sequence[str]) -> str:
    threads = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, *words], env={**os.environ, **threads}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-LAST:]}")
    return f"{name}: {time.monotonic() - began:.0f} s"
