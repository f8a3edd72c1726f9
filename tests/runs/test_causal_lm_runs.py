"""Whole tiny runs of a real language model: resumed equals uninterrupted, and every source of answers is on record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape

from raftune.errors import ConfigChanged, ModelError
from raftune.policies.causal_lm import CausalLM
from raftune.report.collect import collect
from raftune.report.overview import overview
from raftune.report.provenance import configuration
from raftune.results.status import status_of
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import resume, run
from raftune.store.run import RunFolder
from tests.builders import Killed, save_tiny

NOT_COMPARED = ("tmp", "LOCK", "events.jsonl", "environment.json", "config.yaml")


def shortness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(text)) for text in completions]


PROMPTS = pa.table(
    {
        "prompt": [f"say {word}" for word in "abcdefghijklmnopqrstuvwx"],
        "answer": [f"{word} it is" for word in "abcdefghijklmnopqrstuvwx"],
    }
)
OBJECTS = PythonObjects(train=lambda: PROMPTS, rewards=[shortness])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", "gpt2")


def config(root: Path, model: Path, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "output_dir": str(root),
        "num_rounds": 2,
        "prompts_per_round": 8,
        "data": {"prompts": "given as an object"},
        "policy": {"model": str(model)},
        "sampling": {"num_generations": 3, "chunk_size": 4, "max_completion_length": 8},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2, "save_steps": 2},
        "evaluation": {"num_prompts": 2, "num_generations": 2},
        "engine": {"threads": 1},
        "report": False,
    }
    for name, values in sections.items():
        base[name] = {**base[name], **values} if isinstance(base.get(name), dict) else values
    return base


def tree(root: Path) -> dict[str, str]:
    """The hash of every file that a resume must reproduce."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = ((path, path.relative_to(root)) for path in files)
    return {str(n): hashlib.sha256(p.read_bytes()).hexdigest() for p, n in names if n.parts[0] not in NOT_COMPARED}


def dying_after(events: int) -> Callable[[str, dict[str, Any]], None]:
    seen = 0

    def observe(kind: str, facts: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen > events:
            raise Killed

    return observe


@pytest.mark.slow
def test_a_run_cut_short_at_any_stage_ends_with_the_same_bytes(tmp_path: Path, llama: Path) -> None:
    settings = {"policy": {"adapter": {"r": 2}}, "selection": {"beta": 0.01}}
    count = 0

    def counting(kind: str, facts: dict[str, Any]) -> None:
        nonlocal count
        count += 1

    run(config(tmp_path / "whole", llama, **settings), OBJECTS, observe=counting)
    whole = tree(tmp_path / "whole")
    assert count > 60 and any("adapter_model.safetensors" in name for name in whole)
    root = tmp_path / "cut"
    for cut in range(
        3, count, 7
    ):  # the run goes on from where each cut left it, so a later cut needs only a few events more
        with pytest.raises(Killed):
            run(config(root, llama, **settings), OBJECTS, observe=dying_after(3 + cut % 5))
        if (root / "best.json").is_file() and json.loads((root / "best.json").read_text())["rounds"] == 2:
            break
    run(config(root, llama, **settings), OBJECTS)
    assert tree(root) == whole


@pytest.mark.slow
def test_a_run_killed_inside_training_ends_with_the_same_bytes(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(tmp_path / "whole", llama), OBJECTS)
    steps = 0
    backward = torch.Tensor.backward

    def dying(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal steps
        steps += 1
        if steps in (4, 11):  # inside the tunings of round 1 and of round 2, past their first checkpoints
            raise Killed
        backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            run(config(tmp_path / "cut", llama), OBJECTS)
    run(config(tmp_path / "cut", llama), OBJECTS)
    assert steps > 11
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("checkpoint-*"))


@pytest.mark.slow
def test_a_finished_run_does_nothing_when_run_again(tmp_path: Path, llama: Path) -> None:
    run(config(tmp_path / "a", llama), OBJECTS)
    before = tree(tmp_path / "a")
    kinds: list[str] = []
    run(config(tmp_path / "a", llama), OBJECTS, observe=lambda kind, facts: kinds.append(kind))
    assert "stage_begin" not in kinds and tree(tmp_path / "a") == before


@pytest.mark.slow
def test_more_rounds_continue_a_finished_run_as_if_it_had_had_them_from_the_start(tmp_path: Path, llama: Path) -> None:
    run(config(tmp_path / "a", llama, num_rounds=1), OBJECTS)
    run(config(tmp_path / "a", llama, num_rounds=2), OBJECTS)
    run(config(tmp_path / "b", llama, num_rounds=2), OBJECTS)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_another_temperature_is_refused_with_the_difference(tmp_path: Path, llama: Path) -> None:
    run(config(tmp_path / "a", llama, num_rounds=1), OBJECTS)
    with pytest.raises(ConfigChanged, match=r"sampling\.temperature: 1\.0 → 0\.7.*--from"):
        run(config(tmp_path / "a", llama, num_rounds=1, sampling={"temperature": 0.7}), OBJECTS)


def test_a_teacher_that_is_not_there_is_refused_by_its_own_field(tmp_path: Path, llama: Path) -> None:
    nowhere = {"teacher": {"model": str(tmp_path / "nowhere"), "num_generations": 1}}
    with pytest.raises(ModelError, match=r"^sampling\.teacher\.model must be a folder or a hub name"):
        run(config(tmp_path / "a", llama, sampling=nowhere), OBJECTS)


def test_candidates_of_columns_and_of_a_teacher_are_ranked_beside_the_policy_s_own(
    tmp_path: Path, llama: Path, teacher: Path
) -> None:
    pool = {"candidate_columns": ("answer",), "teacher": {"model": str(teacher), "num_generations": 2}}
    events: list[tuple[str, dict[str, Any]]] = []
    given = config(tmp_path / "a", llama, num_rounds=1, sampling=pool, policy={"adapter": {"r": 2}})
    run(given, OBJECTS, observe=lambda kind, facts: events.append((kind, dict(facts))))
    told = [note for kind, facts in events if kind == "chunk" and facts["stage"] == "teach" for note in facts["notes"]]
    assert any(note.startswith("the teacher generates by shared prefix") for note in told)
    verdicts = pq.read_table(tmp_path / "a/round-0001/select/verdicts.parquet").to_pylist()
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for verdict in verdicts:
        by_prompt.setdefault(verdict["prompt_id"], []).append((verdict["k"], verdict["source"]))
    expected = [(0, "policy"), (1, "policy"), (2, "policy"), (3, "column:answer"), (4, "teacher"), (5, "teacher")]
    assert len(by_prompt) == 8
    assert all(sorted(pool) == expected for pool in by_prompt.values())
    assert len({verdict["sample_id"] for verdict in verdicts}) == 8 * 6
    assert all(1 <= verdict["rank"] <= 6 for verdict in verdicts)
    words = status_of(tmp_path / "a").generation  # after the run, how it generated is said in one line
    assert words.startswith("shared prefix") and "nats a token" in words and "merged into the weights" in words
    page = overview(collect(tmp_path / "a")) + configuration(collect(tmp_path / "a"))
    assert page.count(f"Samples are generated by {escape(words)}") == 1
    assert f"samples generated by</th><td>{escape(words)}</td>" in page


def test_a_human_completion_that_is_best_is_learned_from_with_its_end(tmp_path: Path, llama: Path) -> None:
    def answers_win(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    objects = PythonObjects(train=lambda: PROMPTS, rewards=[answers_win])
    run(config(tmp_path / "a", llama, num_rounds=1, sampling={"candidate_columns": ("answer",)}), objects)
    rows = pq.read_table(tmp_path / "a/round-0001/rows/rows.parquet").to_pylist()
    assert {row["source"] for row in rows} == {"column:answer"}
    eos = CausalLM.load(
        _parts(tmp_path / "a"), tmp_path / "a/round-0000/model", tmp_path / "a/round-0000/model"
    ).eos_ids[0]
    assert all(row["completion_ids"][-1] == eos for row in rows)


def _parts(root: Path) -> Any:
    from raftune.config import validate

    return validate(RunFolder(root).read_config())


@pytest.mark.slow
def test_replay_and_reference_rows_join_what_a_round_learns_from(tmp_path: Path, llama: Path) -> None:
    reference = tmp_path / "good.jsonl"
    reference.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) + "\n" for i in range(50)))
    mixed = {"replay_rounds": 1, "reference": {"path": str(reference), "fraction": 0.2}}
    run(config(tmp_path / "a", llama, training=mixed, selection={"all_equal": "keep"}), OBJECTS)
    first = json.loads((tmp_path / "a/round-0001/rows/summary.json").read_text())
    second = json.loads((tmp_path / "a/round-0002/rows/summary.json").read_text())
    assert first == {"reference": 2, "round-0001": 8}
    assert second == {"reference": 4, "round-0001": 8, "round-0002": 8}


@pytest.mark.slow
def test_resume_continues_a_run_that_its_own_directory_describes(tmp_path: Path, llama: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def short(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS.column("prompt").to_pylist()))
    settings = {"data": {"prompts": str(prompts)}, "rewards": {"reward_funcs": [f"{reward}:short"]}}
    run(config(tmp_path / "whole", llama, **settings))
    with pytest.raises(Killed):
        run(config(tmp_path / "cut", llama, **settings), observe=dying_after(25))
    prompts.unlink()  # the run holds its own copy
    resume(tmp_path / "cut")
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
