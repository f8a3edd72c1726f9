"""A whole run on the tabular family that takes a tenth of a second: two rounds of two units, and an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config import RunConfig, TabularPolicy, validate
from raftune.config.load import merge
from raftune.errors import OutOfMemory
from raftune.policies.tabular.policy import Tabular
from raftune.protocols import Chunk
from raftune.records import Sample
from raftune.runtime.assembly import PythonObjects

# Every stage that there is: a teacher, a human's answers, likelihoods, replay.
EVERYTHING: dict[str, Any] = {
    "policy": {"family": "tests.runs.tiny:Dressed", "options": {"num_prompts": 4, "num_answers": 5}},
    "selection": {"beta": 0.3},
    "sampling": {"teacher": {"model": "the start", "num_generations": 2}, "candidate_columns": ("human",)},
    "training": {"replay_rounds": 1},
}


class Dressed(Tabular):
    """The tabular family as a family of somebody's own, which may also have a teacher, and a memory of so many rows."""

    options: dict[str, Any]

    @classmethod
    def start(cls, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> None:
        super().start(undressed(config), out)

    @classmethod
    def load(cls, config: RunConfig, folder: Path, start: Path) -> Dressed:
        found = super().load(undressed(config), folder, start)
        assert isinstance(found, Dressed)
        found.options = config.policy.options
        return found

    def generate(self, chunk: Chunk) -> list[Sample]:
        if chunk.batch_size > self.options.get("memory", chunk.batch_size):
            raise OutOfMemory(f"{chunk.batch_size} rows do not fit", chunk.batch_size)
        return super().generate(chunk)


def undressed(config: RunConfig) -> RunConfig:
    options = config.policy.options
    table = TabularPolicy(num_prompts=options["num_prompts"], num_answers=options["num_answers"])
    sampling = config.sampling.model_copy(update={"teacher": None})
    return config.model_copy(update={"policy": table, "sampling": sampling})


def config(root: Path, **changes: Any) -> RunConfig:
    """Four labels with five answers each; `changes` go over it, section by section."""
    base = {
        "output_dir": str(root),
        "num_rounds": 2,
        "report": False,  # the page has tests of its own
        "prompts_per_round": 8,
        "data": {"prompts": "given as an object"},
        "policy": {} if "policy" in changes else {"family": "tabular", "num_prompts": 4, "num_answers": 5},
        "sampling": {"num_generations": 4, "chunk_size": 4},
        "selection": {"all_equal": "keep"},  # of five answers four are often the same
        "evaluation": {"num_prompts": 4, "num_generations": 2},
        "engine": {"threads": 1},
    }
    return validate(merge([base, changes]))


def objects(reward: Any = None) -> PythonObjects:
    """Twenty prompts with a human's answer to each, four held-out ones, and the answer's number as its reward."""
    return PythonObjects(train=train, held_out=held_out, rewards=[reward or value])


def train() -> pa.Table:
    return pa.table({"prompt": [0, 1, 2, 3] * 5, "human": [3, 1, 4, 1, 0] * 4})


def held_out() -> pa.Table:
    return pa.table({"prompt": [0, 1, 2, 3], "human": [0, 0, 0, 0]})


def value(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    return [float(answer) for answer in completions]
