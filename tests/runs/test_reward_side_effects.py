"""A reward in this process that changes the process (torch's defaults, the environment and more) changes no run."""

from __future__ import annotations

import decimal
import io
import locale
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from raftune.rewards.reward_set import RewardSet
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from tests.builders import save_tiny, tree_hash

pytestmark = pytest.mark.slow

SPOILS = "TESTS_SPOIL"  # in the environment, which is no part of a reward's hash


def change_process() -> None:
    """Changes whatever code in a process can change of it; each call changes it to something else."""
    calls = random.randrange(10**6)
    random.seed(calls)
    np.random.seed(calls)
    torch.manual_seed(calls)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.set_grad_enabled(False)
    torch.set_default_device("meta")
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True)
    np.seterr(all="raise")
    decimal.getcontext().prec = 2
    locale.setlocale(locale.LC_ALL, "C.UTF-8" if locale.setlocale(locale.LC_ALL) == "C" else "C")
    os.environ["HF_HUB_OFFLINE"] = "0"
    os.environ["TRANSFORMERS_CACHE_OF_MINE"] = "/nowhere"
    os.environ.pop("OMP_NUM_THREADS", None)
    os.chdir("/")
    sys.stdout = io.StringIO()


def shortness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    if SPOILS in os.environ:
        change_process()
    return [-float(len(text)) for text in completions]


async def slowly(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    if SPOILS in os.environ:
        change_process()
    return [float(text.count("a")) for text in completions]


@pytest.fixture
def changed_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(SPOILS, "1")
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def config(root: Path, model: Path) -> dict[str, Any]:
    return {
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 4,
        "data": {"prompts": "objects"},
        "policy": {"model": str(model), "device": "cpu", "adapter": {"r": 2, "dropout": 0.1}},
        "sampling": {"num_generations": 3, "chunk_size": 2, "max_completion_length": 6},
        "selection": {"all_equal": "keep"},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 1},
        "evaluation": {"num_prompts": 2, "num_generations": 2},
        "engine": {"threads": 1},
        "report": False,
    }


def objects() -> PythonObjects:
    def prompts(letters: str) -> pa.Table:
        return pa.table({"prompt": [f"say {c}" for c in letters]})

    return PythonObjects(train=lambda: prompts("abcdefgh"), held_out=lambda: prompts("xy"), rewards=[shortness, slowly])


def test_a_run_with_a_reward_that_changes_the_process_has_the_bytes_of_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = save_tiny(tmp_path / "model")
    run(config(tmp_path / "clean", model), objects())
    request.getfixturevalue("changed_process")
    run(config(tmp_path / "spoiled", model), objects())
    stages = [
        {name: value for name, value in tree_hash(tmp_path / root).items() if name.startswith("round-")}
        for root in ("clean", "spoiled")
    ]
    assert len(stages[0]) > 20 and stages[0] == stages[1]


@pytest.mark.parametrize("reward", [shortness, slowly])
def test_after_a_call_the_process_is_as_it_was(
    changed_process: None, capsys: pytest.CaptureFixture[str], reward: Any
) -> None:
    from raftune.rewards import load_reward
    from raftune.rewards.batch import RewardBatch

    def state() -> list[Any]:
        return [
            Path.cwd(),
            dict(os.environ),
            locale.setlocale(locale.LC_ALL),
            sys.stdout,
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_device(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            np.geterr(),
            decimal.getcontext().prec,
        ]

    before = state()
    with RewardSet([load_reward(reward)]) as rewards:
        [score] = rewards.score(RewardBatch(["p"], ["aa"]))
    assert score.value is not None and state() == before
