"""A changed configuration: refused with the difference, redone from the named stage on, or of no consequence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raftune.config.load import merge
from raftune.errors import ConfigChanged, ConfigError, StoreError
from raftune.runtime.run import resume, run, verify
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree

# What is changed, the stage that is made otherwise, and the words that show the difference.
CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "data": ({"data": {"limit": 12}}, "0/data", "data.limit: None → 12"),
    "policy": ({"policy": {"num_answers": 6}}, "0/start", "policy.num_answers: 5 → 6"),
    "seed": ({"seed": 1}, "1/plan", "seed: 0 → 1"),
    "prompts_per_round": ({"prompts_per_round": 4}, "1/plan", "prompts_per_round: 8 → 4"),
    "num_generations": (
        {"sampling": {"num_generations": 3}},
        "1/plan",
        "sampling.num_generations: 4 → 3",
    ),
    "chunk_size": ({"sampling": {"chunk_size": 2}}, "0/evaluation-plan", "sampling.chunk_size: 4 → 2"),
    "temperature": ({"sampling": {"temperature": 0.5}}, "0/evaluation-generate", "sampling.temperature: 1.0 → 0.5"),
    "rewards": ({"rewards": {"batch_size": 7}}, "0/evaluation-score", "rewards.batch_size: 64 → 7"),
    "selection": ({"selection": {"rule": "top_m", "m": 2}}, "1/select", "selection.m: None → 2"),
    "beta": (
        {"selection": {"beta": 0.5}},
        "1/select",
        "0.0 → 0.5, it now also reads 1/logp, 1/logp-start",
    ),
    "replay": ({"training": {"replay_rounds": 1}}, "1/gather", "training.replay_rounds: 0 → 1"),
    "start_from": ({"training": {"start_from": "start"}}, "1/train", "training.start_from: previous → start"),
    "evaluation": ({"evaluation": {"seed": 3}}, "0/evaluation-plan", "evaluation.seed: 0 → 3"),
    "kl": (
        {"evaluation": {"kl": False}},
        "0/evaluate",
        "it no longer reads 0/evaluate/logp, 0/evaluate/logp-start",
    ),
    "threads": ({"engine": {"threads": 2}}, "0/evaluation-generate", "engine.threads: 1 → 2"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(root), tiny.objects())
    return root


def test_an_option_that_the_family_does_not_have_is_refused_before_anything_is_set_aside(copy: Path) -> None:
    before = tree(copy)
    with pytest.raises(ConfigError, match=r"sampling\.top_p means nothing to the tabular family; got 0\.5"):
        run(tiny.config(copy, sampling={"top_p": 0.5}), tiny.objects(), redo="generate,evaluation-generate")
    assert tree(copy) == before and not (copy / "superseded").exists()


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def config(root: Path, changes: dict[str, Any]) -> Any:
    """`tiny.config`, also where the policy's own section is changed."""
    base = {"policy": {"family": "tabular", "num_prompts": 4, "num_answers": 5}}
    return tiny.config(root, **merge([base, changes]))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_with_the_difference_and_nothing_is_touched(copy: Path, name: str) -> None:
    changes, stage, words = CHANGES[name]
    before = tree(copy)
    with pytest.raises(ConfigChanged) as caught:
        run(config(copy, changes), tiny.objects())
    assert words in str(caught.value)
    assert f"add `--from {stage}` to redo it and what follows" in str(caught.value)
    assert difference(before, tree(copy)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_redone_from_the_named_stage_it_is_what_the_new_configuration_gives_from_the_beginning(
    copy: Path, tmp_path: Path, name: str
) -> None:
    changes, stage, _ = CHANGES[name]
    run(config(copy, changes), tiny.objects(), redo=stage)
    run(config(tmp_path / "new", changes), tiny.objects())
    assert difference(tree(tmp_path / "new"), tree(copy)) == ""
    assert verify(copy) == []


def test_what_comes_before_the_named_stage_is_untouched_and_what_was_there_is_kept(copy: Path) -> None:
    before = {path: path.stat().st_ino for path in copy.rglob("*.parquet")}
    generated = {content for name, content in tree(copy).items() if "generate/unit" in name}
    resume(copy, tiny.objects(), redo="2/select")
    same = {path.relative_to(copy).as_posix() for path, inode in before.items() if inode == inode_of(path)}
    assert {name for name in same if name.startswith("round-0002")} == {
        "round-0002/evaluate/plan/prompts.parquet",
        "round-0002/plan/prompts.parquet",
        "round-0002/generate/chunk-00000.parquet",
        "round-0002/generate/chunk-00001.parquet",
        "round-0002/score/chunk-00000.parquet",
        "round-0002/score/chunk-00001.parquet",
    }
    aside = sorted(path.name.split("-", 1)[1] for path in (copy / "superseded").iterdir())
    assert [name for name in aside if name.endswith(("select", "rows", "model"))] == [
        "round-0002-model",
        "round-0002-rows",
        "round-0002-select",
    ]
    assert generated <= set(tree_of_everything(copy).values())


def test_an_evaluation_is_redone_without_the_training(copy: Path) -> None:
    before = {path: path.stat().st_ino for path in copy.rglob("*.parquet")}
    run(config(copy, {"evaluation": {"seed": 3}}), tiny.objects(), redo="evaluation-plan")
    for path, inode in before.items():
        assert (inode_of(path) == inode) == ("evaluate" not in path.parts), path


def inode_of(path: Path) -> int:
    return path.stat().st_ino if path.exists() else -1


def tree_of_everything(root: Path) -> dict[str, str]:
    return tree(root) | {f"superseded/{name}": content for name, content in tree(root / "superseded").items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"workers": 2}},
        {"engine": {"max_retries": 5, "on_chunk_failure": "skip", "chunk_timeout": 99.0}},
        {"keep_models": "best"},
        {"stop": {"patience": 9}},
        {"rewards": {"timeout": 9.0}},
        {"name": "another"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_that_shapes_nothing_can_be_changed(copy: Path, changes: dict[str, Any]) -> None:
    before = {name: content for name, content in tree(copy).items() if not name.startswith("config.")}
    run(config(copy, changes), tiny.objects())
    after = tree(copy)
    dropped = "keep_models" in changes
    assert dropped or before.items() <= after.items()
    assert RunFolder(copy).read_config() == config(copy, changes).model_dump(mode="json") | {"output_dir": None}


def test_more_rounds_are_added_to_a_finished_run(copy: Path, tmp_path: Path) -> None:
    outcome = run(config(copy, {"num_rounds": 3}), tiny.objects())
    run(config(tmp_path / "new", {"num_rounds": 3}), tiny.objects())
    assert outcome.rounds == 3
    assert difference(tree(tmp_path / "new"), tree(copy)) == ""


def test_a_changed_reward_is_refused_and_can_be_scored_anew(copy: Path) -> None:
    def other(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
        return [-float(answer) for answer in completions]

    with pytest.raises(ConfigChanged, match=r"evaluation score of round 0 .*: the rewards have changed"):
        resume(copy, tiny.objects(other))
    resume(copy, tiny.objects(other), redo="evaluation-score")
    assert json.loads((copy / "round-0000/evaluate/metrics.json").read_text())["reward"]["mean"] < 0


@pytest.mark.slow
def test_a_changed_reward_file_is_refused(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def worth(prompts, completions, **kwargs):\n    return [float(c) for c in completions]\n")
    settings = config(tmp_path / "run", {"rewards": {"reward_funcs": [f"{reward}:worth"]}, "num_rounds": 1})
    given = tiny.PythonObjects(train=tiny.train, held_out=tiny.held_out)
    run(settings, given)
    reward.write_text(reward.read_text().replace("float(c)", "float(-c)"))
    with pytest.raises(ConfigChanged, match="the rewards have changed"):
        run(settings, given)


@pytest.mark.parametrize("redo", ["3/select", "select", "1/evaluation-generate"])
def test_a_stage_can_be_named_with_or_without_its_round(copy: Path, redo: str) -> None:
    before = tree(copy)
    if redo.startswith("3"):
        run(config(copy, {"num_rounds": 3}), tiny.objects())
        before = tree(copy)
    resume(copy, tiny.objects(), redo=redo)
    assert difference(before, tree(copy)) == ""


@pytest.mark.parametrize(
    ("redo", "words"),
    [
        ("selekt", "--from must name a stage; got 'selekt'. The stages are data, start, evaluation-plan"),
        ("x/select", "--from must be STAGE or ROUND/STAGE; got 'x/select'"),
        ("0/select", "--from must name a stage; got '0/select'"),
    ],
)
def test_a_stage_that_there_is_not_is_refused_with_those_that_there_are(copy: Path, redo: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resume(copy, tiny.objects(), redo=redo)
    assert words in str(caught.value)


def test_what_was_made_from_dropped_weights_cannot_be_redone(tmp_path: Path) -> None:
    root = tmp_path / "run"
    settings = config(root, {"keep_models": "last", "num_rounds": 3})
    run(settings, tiny.objects())
    assert not (root / "round-0001/model/policy.json").exists()
    before = tree(root)
    with pytest.raises(StoreError, match=r"generate of round 2 cannot be redone: the weights of round 1 were dropped"):
        run(settings, tiny.objects(), redo="2/generate")
    assert tree(root) == before
    run(settings, tiny.objects(), redo="1/train")
    assert difference(before, tree(root)) == ""
    run(settings, tiny.objects(), redo="3/evaluation-generate")
    assert difference(before, tree(root)) == ""
