"""Lets files grow no further than a limit while models are written, and asks what a command makes of that.

    python -m tests.runs.full_disk SCENARIO        prints as JSON, for each limit, how it ended and how it was resumed

The limit (RLIMIT_FSIZE) fails a write in the middle of a file, as a full disk does, in whatever library writes it:
safetensors, torch, pyarrow and Python raise errors of different kinds. Each attempt is a fork of this process, which
has imported torch and run nothing with it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.errors import RaftuneError
from raftune.results.model_card import publish_model
from raftune.reward_models.training import train_reward_model
from raftune.rewards import load_reward
from raftune.runtime.run import run
from raftune.sft import sft
from tests.builders import save_backbone, save_tiny
from tests.runs.kill import in_child
from tests.runs.test_causal_lm_runs import OBJECTS, config, tree
from tests.unit.reward_models.feedback_files import config_for, marked, write

NOT_COMPARED = ("LOCK", "environment.json")
Act = Callable[[Path], object]


def causal_lm(model: Path, **changes: Any) -> Act:
    return lambda root: run(config(root, model, num_rounds=1, **changes), OBJECTS)


def fine_tuning(model: Path, data: Path) -> Act:
    training = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 2}
    policy = {"model": str(model), "device": "cpu"}
    sections = {"data": {"path": str(data), "held_out_fraction": 0.2}, "policy": policy, "training": training}
    return lambda root: sft(validate_as(SftConfig, {"output_dir": str(root), "threads": 1, **sections}))


def reward_training(model: Path, data: Path) -> Act:
    def act(root: Path) -> object:
        settings = config_for(data, model, root, num_train_epochs=1, save_steps=8, allow_chance=True)
        return train_reward_model(settings, lambda folder: load_reward(str(folder)))

    return act


def limits_of(root: Path) -> list[int]:
    """Sizes at which the writing of a small file, of the weights and of an optimizer's state breaks off."""
    weights = max(path.stat().st_size for path in root.rglob("*.safetensors"))
    return [300, 3000, weights - 1, weights + weights // 8]


def limited(act: Act, root: Path, limit: int) -> tuple[str, str]:
    """How it ended: the class of its error, and what it said; `done` where the limit was met by no file."""
    with tempfile.NamedTemporaryFile("r") as told:

        def attempt() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                act(root)
                name, words = "done", ""
            except BaseException as error:
                name, words = type(error).__name__, str(error) if isinstance(error, RaftuneError) else repr(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            Path(told.name).write_text(json.dumps([name, words]))

        in_child(attempt)
        name, words = json.loads(told.read())
        return name, words


def contents(root: Path) -> dict[str, str]:
    return {name: content for name, content in tree(root).items() if name not in NOT_COMPARED}


def examine(scratch: Path, scenario: str) -> list[dict[str, Any]]:
    """For each limit how the command ended, and whether what it was resumed to is what it is without one."""
    model, data = scratch / "model", scratch / "preferences.jsonl"
    make = save_backbone if scenario == "reward" else save_tiny
    assert in_child(lambda: make(model, "llama")) == (0, "")
    write(data, marked())
    act = {
        "full": lambda: causal_lm(model),
        "lora": lambda: causal_lm(model, policy={"adapter": {"r": 4}}),
        "sft": lambda: fine_tuning(model, data),
        "reward": lambda: reward_training(model, data),
        "export": lambda: causal_lm(model),
    }[scenario]()
    whole = scratch / "whole"
    status, said = in_child(lambda: act(whole))
    assert status == 0, said
    expected, found = contents(whole), []
    if scenario == "export":
        expected, made = {}, whole
        act = lambda root: publish_model(made, root)  # noqa: E731
    for number, limit in enumerate(limits_of(whole)):
        root = scratch / f"run-{number}"
        error, words = limited(act, root, limit)
        status, said = in_child(lambda root=root: act(root))
        same = status == 0 and (not expected or contents(root) == expected)
        found.append({"limit": limit, "error": error, "words": words, "resumed": said or same})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(examine(Path(place), sys.argv[1])))
