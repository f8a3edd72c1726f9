"""A chunk that was interrupted is continued from what it had come to, and ends in the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raftune.policies.causal_lm.policy import CausalLM
from raftune.records import Sample, samples_table
from raftune.store import interruption, partial
from tests.builders import Killed, chunk_of, parts, save_tiny

PROMPTS = ["the bath", "a", "ab ab ab", "that thing there", "b", "tha"]
WAYS: dict[str, dict[str, Any]] = {
    "fused": {},
    "forked": {},
    "forked, with a history": {"repetition_penalty": 1.3, "top_k": 40},
    "generate": {"generation_kwargs": {"no_repeat_ngram_size": 3}},
}


# How a run generates, as it is recorded.
RECORD: dict[str, Any] = {"forked": "", "rows": 0, "distances": {}, "noise": 0.0, "allowed": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is saved after every step."""
    monkeypatch.setattr(partial, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(partial, "SHARE", 1e9)


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first entry is the number of steps that are left to the process; None to live on."""
    left: list[int] = [-1]

    def check() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    monkeypatch.setattr(interruption, "raise_if_asked", check)
    yield left


def a_policy(folder: Path, out: Path, way: str = "fused", **changes: Any) -> CausalLM:
    config: Any = parts(folder, max_completion_length=24, batch_size=8, **changes)
    if not out.is_dir():
        CausalLM.start(config, out)
    policy = CausalLM.load(config, out, out)
    policy.use_backend(RECORD if way == "forked" else RECORD | {"fused": ""})
    return policy


def samples_of(policy: CausalLM, at: Path) -> list[Sample]:
    with partial.unfinished_work(at, at / "tmp", "00000", "key", {}):
        return policy.generate(chunk_of(PROMPTS, k=4, batch_size=8))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_generation_that_was_killed_resumes_to_the_same_completions(
    folder: Path, tmp_path: Path, killed_at: list[int], way: str
) -> None:
    policy = a_policy(folder, tmp_path / "start", way, **WAYS[way])
    samples_of(policy, tmp_path / "first")  # what a policy finds out once has steps of its own
    killed_at[0] = -1
    whole = samples_of(policy, tmp_path / "whole")
    steps = -killed_at[0] - 1
    assert steps > (2 if way == "generate" else 40)
    for number in {1, 2, steps // 3, steps // 2, steps - 1} - {0}:
        at = tmp_path / f"killed-{number}"
        killed_at[0] = number
        with pytest.raises(Killed):
            samples_of(policy, at)
        assert len(list(at.glob("_part-*"))) == 1
        killed_at[0] = -1
        assert samples_of(policy, at) == whole
        assert -killed_at[0] - 1 <= steps - number + 1, "steps that were done are not done again"
        assert not list(at.glob("_part-*"))


@pytest.mark.parametrize(("scoring", "batches"), [("by rows", 5), ("", 6)], ids=["rows", "prompts"])
def test_log_probabilities_that_were_interrupted_go_on_to_the_same_numbers(
    folder: Path, tmp_path: Path, killed_at: list[int], scoring: str, batches: int
) -> None:
    policy = a_policy(folder, tmp_path / "start")
    policy.use_backend(RECORD | {"scoring": scoring})
    chunk = chunk_of(PROMPTS, k=4)
    table = samples_table(policy.generate(chunk), policy.payload)
    prompts = [prompt for prompt in chunk.prompts for _ in range(4)]

    def scored(at: Path) -> Any:
        with partial.unfinished_work(at, at / "tmp", "00000", "key", {}):
            return policy.log_probs(prompts, table, 5)

    whole = scored(tmp_path / "whole")
    killed_at[0] = 3
    with pytest.raises(Killed):
        scored(tmp_path / "killed")
    killed_at[0] = -1
    assert np.array_equal(scored(tmp_path / "killed"), whole)
    assert -killed_at[0] - 1 == batches - 3, "three batches were there"


def test_what_was_saved_under_other_settings_or_was_damaged_is_not_used(
    folder: Path, tmp_path: Path, killed_at: list[int]
) -> None:
    policy = a_policy(folder, tmp_path / "start")
    whole = samples_of(policy, tmp_path / "whole")
    killed_at[0] = 20
    with pytest.raises(Killed):
        samples_of(policy, tmp_path)
    killed_at[0] = -1
    [saved] = tmp_path.glob("_part-*")
    with partial.unfinished_work(tmp_path, tmp_path / "tmp", "00000", "another key", {}):
        assert partial.current("fused").find() is None
    killed_at[0] = 20
    with pytest.raises(Killed):
        samples_of(policy, tmp_path)
    killed_at[0] = -1
    [saved] = tmp_path.glob("_part-*")
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    assert samples_of(policy, tmp_path) == whole
