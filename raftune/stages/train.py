"""Stage `train`: trains the next policy; without rows the model stays as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from raftune.config.training import TrainingConfig
from raftune.protocols import PolicyProvider, StageInputs, TrainReport
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import dump_json
from raftune.store.parquet import column_names, read_table
from raftune.training.objectives import objective_code

REPORT = "training.json"
NOTHING = "nothing_to_learn"  # in the report's details: why the policy is that of the round before


class TrainStage:
    """model/, with training.json beside the weights; checkpoints lie in train/ until it is committed.

    A round that has nothing to learn from publishes the model of the round before, and says why in training.json.
    """

    name = "train"
    writes = "model"
    fields = ("training", "seed", "engine.threads")

    def __init__(self, policies: PolicyProvider, config: TrainingConfig, work: Path) -> None:
        self.policies, self.config, self.scratch = policies, config, work
        self.base = "model@-1" if config.start_from == "previous" else "model@0"
        self.reads = ("rows", *dict.fromkeys((self.base, "model@-1")))

    def fingerprints(self) -> Mapping[str, str]:
        return objective_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        rows = inputs["rows"] / "rows.parquet"
        if why := nothing_to_learn(rows, self.config.mask_truncated_completions):
            copy_model(inputs["model@-1"], out)
            report = TrainReport(rows=0, steps=0, losses=(), details={NOTHING: why})
            notes: tuple[str, ...] = (f"{why}: the policy stays as it was",)
        else:
            self.scratch.mkdir(parents=True, exist_ok=True)
            policy = self.policies.fresh(inputs[self.base])
            report = policy.train(rows, self.scratch, out)
            notes = policy.notes()
        dump_json(out / REPORT, asdict(report))
        return notes


def nothing_to_learn(rows: Path, masked: bool) -> str:
    """Why no row can be learned from, in words; empty where one can. `masked`: those that were cut off are left out."""
    names = [name for name in ("weight", "finish") if name in column_names(rows)]
    table = read_table(rows, names)
    weight = table.column("weight").to_numpy()
    if not (weight > 0).any():
        return "selection kept no sample (select/summary.json says why)"
    if not masked or "finish" not in names:
        return ""
    cut = np.array([finish == "length" for finish in table.column("finish").to_pylist()])
    if ((weight > 0) & ~cut).any():
        return ""
    kept = int((weight > 0).sum())
    return f"all {kept} kept answers were cut off, and training.mask_truncated_completions leaves such out"


def copy_model(folder: Path, out: Path) -> None:
    """The files of a committed model without what is said of it alone; weights are linked where the file system can."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in (COMMIT, REPORT):
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)
