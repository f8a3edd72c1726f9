"""Evaluates a round's model on given prompts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from raftune.config.load import validate
from raftune.config.run import RunConfig
from raftune.errors import DataError
from raftune.policies.causal_lm.policy import CausalLM
from raftune.results.round_metrics import held_out
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.evaluation_target import INHERITED, without_learning
from raftune.runtime.run import run
from raftune.store.committed import read_json
from raftune.store.run import RunFolder
from raftune.trainer.inputs import PromptInputs

ALL = 2**31  # prompts at most


def measure(
    config: RunConfig,
    objects: PythonObjects,
    trained: tuple[RunFolder, int] | None,
    prompts: PromptInputs,
    observe: Any,
) -> dict[str, Any]:
    """The metrics of the model on all of these prompts: of a run's round, or of the start before there is a run.

    Answers are as many and as long as those to the run's held-out prompts, under the same seeds.
    """
    plain = config.model_dump(mode="json")
    sections = without_learning({name: plain[name] for name in ("policy", *INHERITED)})
    if trained is not None:
        folder, start = (trained[0].folder(number, "model").resolve() for number in (trained[1], 0))
        sections["policy"] = CausalLM.section_at(plain["policy"], folder, start)
        objects = replace(objects, model=None, tokenizer=None)
    asked = {"prompts": prompts.source, "num_prompts": ALL, "best_by": "reward", "kl": False}
    sections["evaluation"] |= {**asked, "reference_column": None, "features": None}
    sections["data"] |= {"prompts": None, "limit": None}
    with tempfile.TemporaryDirectory(prefix="raftune-evaluation-") as place:
        own = validate({**sections, "output_dir": place, "num_rounds": 0, "report": False})
        run(own, replace(objects, train=None, held_out=prompts.table), observe=observe)
        path = RunFolder(place).folder(0, "evaluate") / "metrics.json"
        found: dict[str, Any] = read_json(path)
    if not found:
        raise DataError("eval_dataset must hold at least one prompt; got none.")
    return found


def evaluate_on(
    several: dict[str, PromptInputs], prefix: str, measured: Callable[[PromptInputs], dict[str, Any]]
) -> dict[str, float]:
    """The metrics of each data set under its own prefix, with the time that it took."""
    found: dict[str, float] = {}
    for name, prompts in several.items():
        began = time.perf_counter()
        start = f"{prefix}_{name}" if name else prefix
        values = held_out(measured(prompts), start, ends=True)
        seconds = time.perf_counter() - began
        samples = sum(count for key, count in values.items() if key.startswith(f"{start}_statuses/"))
        found |= values | {f"{start}_runtime": seconds, f"{start}_samples_per_second": samples / seconds}
    return found
