"""QLoRA on a CPU: the same promises as with any other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from raftune.runtime.run import run
from raftune.runtime.verification import faults_of
from raftune.store.run import RunFolder
from tests.builders import Killed, tiny_llama, tiny_tokenizer
from tests.runs.test_causal_lm_runs import OBJECTS, config, tree


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Llama whose layers read 40 and 90 numbers: no multiples of the 64 weights that share a scale."""
    tiny_llama(hidden_size=40, intermediate_size=90).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_qlora_on_a_cpu_gives_the_same_bytes_after_a_death_in_training(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds, beta, evaluations; the second run dies inside the first training, and is continued."""
    settings: dict[str, Any] = {"policy": {"adapter": {"r": 2}, "load_in_4bit": True}, "selection": {"beta": 0.05}}
    run(config(tmp_path / "whole", model, **settings), OBJECTS)
    steps, backward = 0, torch.Tensor.backward

    def dying(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 4:  # past the first checkpoint
            raise Killed
        backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", dying)
    with pytest.raises(Killed):
        run(config(tmp_path / "cut", model, **settings), OBJECTS)
    run(config(tmp_path / "cut", model, **settings), OBJECTS)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert not faults_of(RunFolder(tmp_path / "whole"))
    adapter = tmp_path / "whole" / "round-0002" / "model" / "adapter_model.safetensors"
    assert adapter.is_file() and adapter.stat().st_size < (model / "model.safetensors").stat().st_size
    losses = json.loads((adapter.parent / "training.json").read_text())["losses"]
    assert losses[-1] < losses[0]
