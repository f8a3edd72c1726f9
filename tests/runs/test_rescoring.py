"""`--only`: the samples that failed are asked about again, and no other score changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from raftune.config.load import merge
from raftune.errors import ConfigError, RewardError, RunDamaged
from raftune.runtime import rescoring
from raftune.runtime.run import resume, run, verify
from raftune.stages.score import KEPT, logged_metrics
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.kill import difference, tree

NEVER: dict[str, Any] = {"evaluation": {"num_prompts": 0}, "num_rounds": 1, "rewards": {"batch_size": 1}}
Rows = dict[str, dict[str, Any]]


class FailingReward:
    """Fails at the answer 3 and calls the answer 2 no number until it is well; then adds 100 to all that it is asked.

    What it depends on lies in the environment, which is no part of a reward's hash.
    """

    def __init__(self) -> None:
        self.__name__ = "moody"
        self.well, self.asked = False, []

    @property
    def well(self) -> bool:
        return os.environ["MOODY_WELL"] == "True"

    @well.setter
    def well(self, well: bool) -> None:
        os.environ["MOODY_WELL"] = str(well)

    @property
    def asked(self) -> list[int]:
        return list(map(int, os.environ["MOODY_ASKED"].split()))

    @asked.setter
    def asked(self, asked: list[int]) -> None:
        os.environ["MOODY_ASKED"] = " ".join(map(str, asked))

    def __call__(self, prompts: Any, completions: list[int], log_metric: Any, log_extra: Any, **columns: Any) -> Any:
        self.asked += completions
        if completions[0] == 3 and not self.well:
            raise RuntimeError("the endpoint is down")
        log_metric("calls", 1.0 + self.well)
        log_extra("now", [self.well] * len(completions))
        if completions[0] == 2 and not self.well:
            return [float("nan")]
        return [answer + 100.0 * self.well for answer in completions]


def scores(root: Path, stage: str = "round-0001/score") -> Rows:
    return {
        row["sample_id"]: row
        for path in sorted((root / stage).glob("chunk-*"))
        for row in pq.read_table(path).to_pylist()
    }


def completions_of(root: Path, stage: str = "round-0001/generate") -> dict[str, int]:
    return {name: row["completion"] for name, row in scores(root, stage).items()}


def test_only_failed_samples_are_scored_again_and_all_other_scores_stay_although_the_reward_changed(
    tmp_path: Path,
) -> None:
    reward = FailingReward()
    run(tiny.config(tmp_path, **NEVER), tiny.objects(reward))
    before, generated = scores(tmp_path), completions_of(tmp_path)
    calls = logged_metrics(tmp_path / "round-0001/score")
    assert {row["status"] for row in before.values()} == {"ok", "error", "invalid"}
    reward.well, reward.asked = True, []

    resume(tmp_path, tiny.objects(reward), redo="score", only="timeout, error")

    failed = [name for name, answer in generated.items() if answer == 3]
    assert reward.asked == [3] * len(failed)
    after = scores(tmp_path)
    assert {name: row for name, row in after.items() if name not in failed} == {
        name: row for name, row in before.items() if name not in failed
    }
    asked = [after[name] for name in failed]
    assert {(row["score"], row["status"], row["detail"], row["extra/now"]) for row in asked} == {
        (103.0, "ok", "", "true")
    }
    number = len(before) - len(failed)
    assert calls == {"calls": 1.0}
    assert logged_metrics(tmp_path / "round-0001/score") == {
        "calls": pytest.approx((number + 2 * len(failed)) / len(before))
    }
    kept = [
        json.loads(pq.read_schema(path).metadata[KEPT.encode()]) for path in tmp_path.glob("round-0001/score/chunk-*")
    ]
    assert sum(told["kept"] for told in kept) == number
    verdicts = pq.read_table(tmp_path / "round-0001/select/verdicts.parquet").to_pylist()
    assert {row["score"] for row in verdicts if row["sample_id"] in failed} == {103.0}
    assert not (tmp_path / "again").exists()
    assert verify(tmp_path) == []


@pytest.mark.parametrize("combine", ["sum", "rank"])
def test_with_a_fixed_reward_training_and_evaluation_have_the_scores_that_it_gives_alone(
    tmp_path: Path, combine: str
) -> None:
    def broken(prompts: Any, completions: list[int], **columns: Any) -> list[float]:
        return [float(answer) / (answer != 3) for answer in completions]

    asked = []

    def fixed(prompts: Any, completions: list[int], **columns: Any) -> list[float]:
        asked.extend(completions)
        return [float(answer) for answer in completions]

    fixed.__name__ = broken.__name__  # which names the columns
    changes = {
        "rewards": {"batch_size": 1, "combine": combine},
        "num_rounds": 1,
        "evaluation": {"best_by": "broken"},
    }
    run(tiny.config(tmp_path / "run", **changes), tiny.objects(broken))
    generated = [
        completions_of(tmp_path / "run", f"round-000{place}") for place in ("0/evaluate/generate", "1/generate")
    ]
    resume(tmp_path / "run", tiny.objects(fixed), redo="score", only="error")
    failed = sum(list(place.values()).count(3) for place in generated)
    again = list(completions_of(tmp_path / "run", "round-0001/evaluate/generate").values())  # of the new model
    assert asked == [3] * failed + again

    run(tiny.config(tmp_path / "new", **changes), tiny.objects(fixed))
    for stage in ("round-0000/evaluate/score", "round-0001/score", "round-0001/evaluate/score"):
        assert scores(tmp_path / "run", stage) == scores(tmp_path / "new", stage)
    assert verify(tmp_path / "run") == []


def test_the_rounds_before_the_first_with_such_a_sample_stay(tmp_path: Path) -> None:
    reward = FailingReward()
    reward.well = True
    run(tiny.config(tmp_path, **NEVER), tiny.objects(reward))
    before = tree(tmp_path / "round-0001")
    reward.well = False
    run(tiny.config(tmp_path, **merge([NEVER, {"num_rounds": 2}])), tiny.objects(reward))
    failed = list(completions_of(tmp_path, "round-0002/generate").values()).count(3)
    assert failed
    reward.well, reward.asked = True, []
    resume(tmp_path, tiny.objects(reward), redo="score", only="error")
    assert reward.asked == [3] * failed
    assert difference(before, tree(tmp_path / "round-0001")) == ""


@pytest.mark.parametrize(
    ("redo", "only", "words"),
    [
        (None, "error", "--only must go with --from; got error alone"),
        (
            "select",
            "error",
            "--only must go with --from score, evaluation-score or evaluation-judge; got --from select",
        ),
        ("score,1/generate", "error", "got --from score,1/generate"),
        ("score", "errors", "--only must name statuses; got 'errors'. They are ok, not_applicable, invalid, error"),
        ("score", "", "--only must name statuses; got ''"),
        ("score", "timeout", "--only must name a status that a sample has; got timeout, and with --from score there"),
    ],
)
def test_what_cannot_be_scored_again_is_refused_by_name_and_nothing_changes(
    finished: Path, redo: str | None, only: str, words: str
) -> None:
    before = tree(finished)
    with pytest.raises(ConfigError) as caught:
        resume(finished, tiny.objects(FailingReward()), redo=redo, only=only)
    assert words in str(caught.value)
    assert difference(before, tree(finished)) == ""
    assert not (finished / "superseded").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finished")
    run(tiny.config(root, **NEVER), tiny.objects(FailingReward()))
    return root


def test_rewards_of_other_names_and_runs_that_are_none_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ConfigError, match=r"--only must keep the scores of the same rewards; .* moody, and .* value now"
    ):
        resume(finished, tiny.objects(), redo="score", only="error")
    with pytest.raises(ConfigError, match="--only must go with a run that has scores"):
        run(tiny.config(tmp_path / "new", **NEVER), tiny.objects(), redo="score", only="error")
    assert not (tmp_path / "new").exists()
    assert main(["resume", str(finished), "--only", "error"]) == 2
    assert "--only must go with --from; got error alone" in capsys.readouterr().err


class Cut(BaseException):
    """Ends a run in the midst."""


def test_a_started_rescoring_is_completed_by_a_plain_resume_and_other_statuses_are_refused_until_then(
    tmp_path: Path,
) -> None:
    reward = FailingReward()
    run(tiny.config(tmp_path, **NEVER), tiny.objects(reward))
    before, generated = scores(tmp_path), completions_of(tmp_path)
    failed = [name for name, answer in generated.items() if answer == 3]
    reward.well, reward.asked = True, []

    def cut(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "score":
            raise Cut

    with pytest.raises(Cut):
        resume(tmp_path, tiny.objects(reward), redo="score", only="error", observe=cut)
    with pytest.raises(
        ConfigError, match="--only must be error, with --from score, until the started rescoring is complete"
    ):
        resume(tmp_path, tiny.objects(reward), redo="score", only="invalid")
    resume(tmp_path, tiny.objects(reward))
    assert reward.asked == [3] * len(failed)
    after = scores(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {*failed}
    assert not (tmp_path / "again").exists()


def test_all_is_scored_where_a_started_rescoring_is_given_up(tmp_path: Path) -> None:
    reward = FailingReward()
    run(tiny.config(tmp_path, **NEVER), tiny.objects(reward))
    reward.well = True

    def cut(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "score":
            raise Cut

    with pytest.raises(Cut):
        resume(tmp_path, tiny.objects(reward), redo="score", only="error", observe=cut)
    resume(tmp_path, tiny.objects(reward), redo="score")
    assert {row["score"] >= 100 for row in scores(tmp_path).values()} == {True}
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("file", ["again.json", "only.json", "chunk-00000.parquet", "_COMMIT.json"])
def test_damage_to_what_is_kept_for_unfinished_work_is_named_by_verify_and_refused_by_resume(
    tmp_path: Path, file: str
) -> None:
    reward = FailingReward()
    run(tiny.config(tmp_path, **NEVER), tiny.objects(reward))
    asked = rescoring.Rescoring("score", ("error",), frozenset({(1, "score")}))
    rescoring.begin(RunFolder(tmp_path), asked, [(1, "score")])
    assert verify(tmp_path) == []
    [path] = (tmp_path / "again").rglob(file)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"error", b"other") if path.suffix == ".json" else content[:-1])
    if file == "_COMMIT.json":
        path.write_bytes(content.replace(b'"bytes": ', b'"bytes": 1', 1))
    assert any(str(path) in fault for fault in verify(tmp_path))
    with pytest.raises(RunDamaged, match=file.replace(".", "[.]")):
        resume(tmp_path, tiny.objects(reward), redo="score", only="error")


def test_too_many_failures_name_the_command_that_asks_about_them_alone(tmp_path: Path) -> None:
    rewards = {"batch_size": 1, "max_failure_fraction": 0.0}
    with pytest.raises(RewardError, match="--from score --only error,invalid"):
        run(tiny.config(tmp_path, **{**NEVER, "rewards": rewards}), tiny.objects(FailingReward()))


# -- wherever a run is worked on ---------------------------------------------------------------------------------------

BROKEN = "def worth(prompts, completions, **columns):\n    return [c / (c != 3) for c in completions]\n"
MENDED = "def worth(prompts, completions, **columns):\n    return [100.0 + c for c in completions]\n"


def assert_only_failed_changed(before: Rows, after: Rows) -> None:
    failed = {name for name, row in before.items() if row["status"] == "error"}
    assert failed and failed != before.keys() == after.keys()
    assert all(after[name] == row for name, row in before.items() if name not in failed)
    assert {after[name]["score"] for name in failed} == {103.0}


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    """A reward's file; each score is asked for alone, so that an error is of one sample."""
    (tmp_path / "reward.py").write_text(BROKEN)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": {i % 4}}}\n' for i in range(20)))
    return tmp_path / "reward.py"


def of_files(root: Path, reward: Path, **changes: Any) -> Any:
    prompts = str(reward.parent / "prompts.jsonl")
    sections = {
        "data": {"prompts": prompts},
        "evaluation": {"prompts": prompts, "num_prompts": 8, "num_generations": 4},
        "rewards": {"reward_funcs": [f"{reward}:worth"], "batch_size": 1},
        "num_rounds": 1,
    }
    return tiny.config(root, **{**sections, **changes})


@pytest.mark.slow
def test_workers_score_the_failed_samples_alone_again(tmp_path: Path, reward: Path) -> None:
    root = tmp_path / "run"
    run(of_files(root, reward, engine={"workers": 2}))
    before = scores(root)
    reward.write_text(MENDED)
    resume(root, redo="score", only="error")
    assert_only_failed_changed(before, scores(root))
    assert verify(root) == []


@pytest.mark.slow
def test_evaluate_scores_the_failed_samples_alone_again(tmp_path: Path, reward: Path) -> None:
    run(of_files(tmp_path / "run", reward))
    root = tmp_path / "evaluation"
    command = ["evaluate", f"{tmp_path / 'run'}@start", "--output-dir", str(root), "--evaluation.num-generations", "6"]
    assert main(command) == 0
    before = scores(root, "round-0000/evaluate/score")
    reward.write_text(MENDED)
    assert main([*command, "--from", "evaluation-score", "--only", "error"]) == 0
    assert_only_failed_changed(before, scores(root, "round-0000/evaluate/score"))
    assert verify(root) == []
