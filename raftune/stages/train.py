"""Stage `train`: trains the next policy; without rows the model stays as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from raftune.config.training import SHARING, TrainingConfig
from raftune.protocols import PolicyProvider, SingleStage, StageInputs, SupportsMismatch, TrainReport
from raftune.store.commit import NAME as COMMIT
from raftune.store.files import dump_json
from raftune.store.parquet import column_names, read_table
from raftune.training.objectives import objective_code

REPORT = "training.json"
NOTHING = "nothing_to_learn"  # in the report's details: why the policy is that of the round before


class TrainStage(SingleStage):
    """model/, with training.json beside the weights; checkpoints lie in train/ until it is committed.

    A round without rows to train on publishes the model of the round before, and says why in training.json.
    """

    name = "train"
    writes = "model"
    fields = ("training", "seed", "engine.threads")
    unkeyed = SHARING  # a run goes on with other GPUs

    def __init__(
        self,
        policies: PolicyProvider,
        config: TrainingConfig,
        work: Path,
        train: Callable[[Path, Path, Path, Path], tuple[TrainReport, tuple[str, ...]]] | None = None,
    ) -> None:
        """train(folder, rows, work, out): trains the policy of a folder elsewhere; None: in this process."""
        self.policies, self.config, self.train = policies, config, train
        self.work = self.scratch = work
        self.base = "model@-1" if config.start_from == "previous" else "model@0"
        self.reads = ("rows", *dict.fromkeys((self.base, "model@-1")))

    def fingerprints(self) -> Mapping[str, str]:
        return objective_code(self.config)

    def run(self, inputs: StageInputs, out: Path) -> tuple[str, ...]:
        rows = inputs["rows"] / "rows.parquet"
        if why := nothing_to_learn(rows, self.config.mask_truncated_completions):
            previous = inputs["model@-1"]
            for path in sorted(path for path in previous.rglob("*") if path.is_file()):
                name = path.relative_to(previous)
                if name.as_posix() not in (COMMIT, REPORT):
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        os.link(path, out / name)
                    except OSError:  # the file system has no links
                        shutil.copyfile(path, out / name)
            report = TrainReport(rows=0, steps=0, losses=(), details={NOTHING: why})
            notes: tuple[str, ...] = (f"{why}: the policy stays as it was",)
        elif self.train is not None:
            report, notes = self.train(inputs[self.base], rows, self.work, out)
        else:
            self.work.mkdir(parents=True, exist_ok=True)
            mismatch: Mapping[str, Any] = {}
            if inputs[self.base] != inputs["model@-1"]:  # else it is measured where training loads its model
                generator = self.policies.at(inputs["model@-1"])
                mismatch = generator.mismatch(rows) if isinstance(generator, SupportsMismatch) else {}
            policy = self.policies.fresh(inputs[self.base])
            report = policy.train(rows, self.work, out)
            if mismatch:
                report = replace(report, details={**report.details, "mismatch": mismatch})
            notes = policy.notes()
        dump_json(out / REPORT, asdict(report))
        return notes


def nothing_to_learn(rows: Path, masked: bool) -> str:
    """Why no row can be trained on, in words; empty where one can. `masked`: truncated completions are left out."""
    table = read_table(rows, [name for name in ("weight", "finish") if name in column_names(rows)])
    kept = table.filter(pc.greater(table.column("weight"), 0))
    if not kept.num_rows:
        return "selection kept no sample (select/summary.json says why)"
    if not masked or "finish" not in kept.column_names:
        return ""
    if not np.all([finish == "length" for finish in kept.column("finish").to_pylist()]):
        return ""
    return f"all {kept.num_rows} kept completions were cut off, and training.mask_truncated_completions leaves such out"
