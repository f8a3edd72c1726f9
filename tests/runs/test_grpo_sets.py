"""Scripts for GRPO run with the two names changed; what must go is told in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raftune.errors import ConfigError
from raftune.trainer import RaftConfig, RaftTrainer
from tests.runs.grpo_sets import SCRIPTS, Script, trainer_of

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

# One small round; everything else is the script's own.
OVERLAY = {
    "num_rounds": 1,
    "prompts_per_round": 3,
    "sampling.max_completion_length": 4,
    "sampling.num_generations": 3,
    "evaluation.num_prompts": 1,
    "evaluation.num_generations": 1,
    "training.bf16": False,
    "engine.threads": 1,
    "report": False,
}


def test_at_least_twenty_of_twenty_four_run() -> None:
    assert len(SCRIPTS) == 24
    assert len([script for script in SCRIPTS if not script.refused]) >= 20


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_runs_with_two_names_changed_or_gets_all_errors_at_once(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in script.environment.items():
        monkeypatch.setenv(name, value)
    if script.refused:
        with pytest.raises(ConfigError) as found:
            trainer_of(script, RaftConfig, RaftTrainer, tmp_path, OVERLAY)
        named = [line.split(" ")[0] for line in str(found.value).splitlines()]
        assert sorted(named) == sorted(script.refused)
        return
    trainer = trainer_of(script, RaftConfig, RaftTrainer, tmp_path, OVERLAY)
    if script.trains:
        masked = script.config.get("mask_truncated_completions")  # all answers of four tokens are cut off here
        assert trainer.train().global_step > 0 or masked
