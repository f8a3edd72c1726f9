"""The benchmark of one GPU runs in small on a CPU, and its parts are apart from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_measures_ours_and_the_others_and_a_resumed_round_has_the_same_bytes(tmp_path: Path) -> None:
    """In one process here: importing torch for each part takes longer than the parts."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, (_, part) in gpu.PARTS.items():
        (tmp_path / name).mkdir()
        part(gpu.SIZES["tiny"], gpu.Rows(tmp_path / name / "rows.json"), tmp_path / name)
        rows[name] = json.loads((tmp_path / name / "rows.json").read_text())
    assert [row["ours"] for row in rows.pop("resume")] == ["equal"] * 4
    vllm = [row for name in ("vllm-0.5b", "vllm-7b") for row in rows.pop(name)]
    assert all(row["others"] or "not installed" in row["note"] for row in vllm)
    assert all(row["ours"] > 0 for part in rows.values() for row in part)
    others = {name: {key for row in part for key in row["others"]} for name, part in rows.items()}
    assert others["generate-7b"] == {"generate", "row by row"} and others["images"] == {"pipeline"}
    assert others["train-full"] == others["train-lora"] == {"SFTTrainer"}


@pytest.mark.slow
def test_a_part_that_is_out_of_time_is_ended_and_named_and_the_table_is_printed(tmp_path: Path) -> None:
    options = ["--size", "tiny", "--parts", "round,vllm-7b", "--minutes", "0.05", "--out", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    faults = [part["fault"] for part in json.loads((tmp_path / "out.json").read_text())["parts"]]
    assert faults == ["ended after 3 s, its share of the time", "there was no time left for it"]
    assert all(fault in done.stdout for fault in faults)
