"""Stage `tune`: the next policy, fitted to what was gathered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from raftune.config.tuning import TuningConfig
from raftune.errors import DataError
from raftune.protocols import Inputs, PolicyShelf
from raftune.store.parquet import read_metadata


class Tune:
    """model/, with training.json beside the weights; checkpoints lie in tune/ until it is committed."""

    name = "tune"
    writes = "model"
    fields = ("tuning", "seed", "engine.threads")

    def __init__(self, policies: PolicyShelf, config: TuningConfig, work: Path) -> None:
        self.policies, self.scratch = policies, work
        self.base = "model@-1" if config.start_from == "previous" else "model@0"
        self.reads = ("rows", self.base)

    def fingerprints(self) -> Mapping[str, str]:
        return {}

    def run(self, inputs: Inputs, out: Path) -> tuple[str, ...]:
        rows = inputs["rows"] / "rows.parquet"
        count, _ = read_metadata(rows)
        if count == 0:
            raise DataError(
                "selection kept no sample of this round, so there is nothing to tune on. The reasons are in "
                f"{inputs['rows'].parent / 'select' / 'summary.json'}; loosen the section `selection`, or mend the "
                "reward, and run `raftune train … --from select`."
            )
        self.scratch.mkdir(parents=True, exist_ok=True)
        policy = self.policies.fresh(inputs[self.base])
        report = policy.tune(rows, self.scratch, out)
        (out / "training.json").write_text(json.dumps(asdict(report), indent=2, sort_keys=True) + "\n")
        return policy.notes()
