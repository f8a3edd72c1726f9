"""A text family that learns nothing and says what hostile people say: runs whose every text is an injection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.config import RunConfig, validate
from raftune.config.load import merge
from raftune.protocols import Chunk, TrainReport
from raftune.records import Prompt, Sample
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.store.run import RunFolder
from tests.injections import HOSTILE

NAMES = (HOSTILE[0], HOSTILE[4], "__proto__", "constructor")
LENGTH = {"spec": "length", "name": "пароль_ﷺ", "options": {"target": 20}}


class InjectionFamily:
    """Draws one of its sentences by the seed alone."""

    media = "text"
    payload = pa.schema(
        [
            pa.field("completion", pa.string(), nullable=False),
            pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("finish", pa.string(), nullable=False),
        ]
    )
    nbytes = 0

    def __init__(self, sentences: list[str]) -> None:
        self.sentences = sentences

    @classmethod
    def start(cls, config: RunConfig, out: Path, model: Any = None, tokenizer: Any = None) -> None:
        (out / "policy.json").write_text(json.dumps(config.policy.options.get("sentences") or list(HOSTILE)))

    @classmethod
    def verify(cls, start: Path) -> None: ...

    @classmethod
    def load(cls, config: RunConfig, folder: Path, start: Path) -> InjectionFamily:
        return cls(json.loads((folder / "policy.json").read_text()))

    def generate(self, chunk: Chunk) -> list[Sample]:
        samples = []
        for prompt, seeds in zip(chunk.prompts, chunk.seeds, strict=True):
            for k, seed in enumerate(seeds):
                said = self.sentences[seed % len(self.sentences)]
                payload = {"completion_ids": list(range(len(said) % 60)), "finish": "length" if k == 1 else "eos"}
                name = chunk.sample_id(prompt, k)
                samples.append(Sample(name, prompt.id, k, "policy", seed, chunk.version, said, payload))
        return samples

    def encode_completion(self, prompt: Prompt, answer: Any, source: str) -> Mapping[str, Any]:
        return {"completion": answer, "completion_ids": [1], "finish": "eos"}

    def train(self, rows: Path, work: Path, out: Path) -> TrainReport:
        (out / "policy.json").write_text(json.dumps(self.sentences))
        return TrainReport(rows=1, steps=1, losses=(0.0,))

    def notes(self) -> tuple[str, ...]:
        return ()


def injection_run(root: Path, **changes: Any) -> Path:
    """A finished run of one round whose prompts, answers, reward names and run name are injections."""
    base = {
        "output_dir": str(root),
        "num_rounds": 1,
        "prompts_per_round": len(HOSTILE),
        "report": False,
        "data": {"prompts": "given as an object"},
        "policy": {"family": "tests.runs.injection_family:InjectionFamily"},
        "sampling": {"num_generations": 3, "chunk_size": 16},
        "evaluation": {"num_prompts": 5, "num_generations": 2, "reward_funcs": [LENGTH]},
        "engine": {"threads": 1},
    }
    prompts = pa.table({"prompt": list(HOSTILE), HOSTILE[0]: list(HOSTILE)})
    rewards = [reward_named(name) for name in NAMES]
    held_out = prompts.slice(0, 5)
    run(
        validate(merge([base, changes])),
        PythonObjects(train=lambda: prompts, held_out=lambda: held_out, rewards=rewards),
    )
    folder = RunFolder(root)
    folder.write_config(folder.read_config() | {"name": HOSTILE[0] + HOSTILE[-6]})
    with (root / "config.yaml").open("a") as file:
        file.write("\n# " + " ".join(HOSTILE[:10]) + "\n")
    return root


def reward_named(name: str) -> Any:
    """A reward of this name: the length of the answer."""

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text) % 97) for text in completions]

    reward.__name__ = name
    return reward
