"""Guards in whole runs: what they write, that they stop only when told to, and that they leave the rest as it is."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from raftune.cli import main
from raftune.config import RunConfig, validate
from raftune.config.load import merge
from raftune.errors import ConfigChanged, ConfigError
from raftune.results.summary import alarms_of
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.progress import Progress
from raftune.runtime.run import resume, run, verify
from raftune.store.commit import Manifest, stage_key
from raftune.store.run import RunFolder
from tests.builders import tree_hash
from tests.runs import tiny

LABELS, ANSWERS, ROUNDS = 24, 6, 3


def loud(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    """The trained reward: the higher the answer's number, the better."""
    return [float(answer) for answer in completions]


def even(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    """A quiet second part."""
    return [0.01 * (answer % 2) for answer in completions]


def diverging_config(root: Path, **changes: Any) -> RunConfig:
    """A run whose trained reward, high numbers, and held-out one, low numbers, are opposites."""
    base = {
        "output_dir": str(root),
        "num_rounds": ROUNDS,
        "prompts_per_round": LABELS,
        "data": {"prompts": "given as an object"},
        "policy": {"family": "tabular", "num_prompts": LABELS, "num_answers": ANSWERS},
        "sampling": {"num_generations": 4, "chunk_size": 8},
        "selection": {"all_equal": "keep"},
        "evaluation": {"num_prompts": LABELS, "num_generations": 8, "reward_funcs": ["tests.runs.judges:low"]},
        "engine": {"threads": 1},
        "report": False,
    }
    return validate(merge([base, changes]))


def python_objects() -> PythonObjects:
    labels = pa.table({"prompt": list(range(LABELS))})
    return PythonObjects(train=lambda: labels, held_out=lambda: labels, rewards=[loud, even])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("guarded") / "run"
    run(diverging_config(root), python_objects())
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_guards(root: Path) -> None:
    """Makes the run one of a version that knew no guards."""
    for folder in root.glob("round-*/guard"):
        shutil.rmtree(folder)
    config = RunFolder(root).read_config()
    del config["guards"]
    RunFolder(root).write_config(config)


def test_alarms_of_a_run_without_a_finished_round_point_to_resume_and_not_to_the_guards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    run(tiny.config(root), tiny.objects())
    for folder in root.glob("round-*"):
        shutil.rmtree(folder)
    assert main(["alarms", str(root)]) == 2
    err = capsys.readouterr().err
    assert f"`raftune resume {root}`" in err
    assert "guards.enabled" not in err


def test_every_round_but_the_start_is_measured_and_judged(finished: Path) -> None:
    folder = RunFolder(finished)
    assert [r for r in folder.rounds() if folder.commit(r, "guard") is not None] == [1, 2, 3]
    sets = json.loads((folder.folder(1, "guard") / "metrics.json").read_text())
    assert set(sets["generated"]) == {"samples", "reward", "rewards/loud", "rewards/even"}
    assert (sets["generated"]["samples"], sets["selected"]["samples"]) == (LABELS * 4, LABELS)
    summary = json.loads((folder.folder(1, "select") / "summary.json").read_text())
    assert sets["generated"]["reward"] == pytest.approx(summary["reward_generated"])
    assert sets["selected"]["reward"] == pytest.approx(summary["reward_kept"])
    assert verify(finished) == []


def test_a_divergence_of_the_rewards_raises_an_alarm_whose_samples_are_on_disk(finished: Path) -> None:
    folder = RunFolder(finished)
    found = {alarm["alarm"]: alarm for alarm in alarms_of(folder, 1)}
    assert set(found) == {"held_out_falls", "part_dominates"}
    assert found["held_out_falls"]["round"] == 1
    assert found["held_out_falls"]["numbers"]["since"] == 0
    assert "the held-out low fell by" in found["held_out_falls"]["evidence"]
    assert found["part_dominates"]["numbers"]["part"] == "loud"
    for name, place in (("held_out_falls", "evaluate/generate"), ("part_dominates", "generate")):
        files = sorted(folder.folder(1, place).glob("*.parquet"))
        ids = {i for path in files for i in pq.read_table(path).column("sample_id").to_pylist()}
        assert {item["sample_id"] for item in found[name]["samples"]} <= ids


@pytest.mark.slow
def test_a_guard_stops_nothing_by_default_and_stop_on_names_it(finished: Path, tmp_path: Path) -> None:
    assert RunFolder(finished).rounds()[-1] == ROUNDS
    outcome = run(diverging_config(tmp_path / "run", guards={"stop_on": ["held_out_falls"]}), python_objects())
    assert outcome.rounds == 1
    assert outcome.reason.startswith("round 1 raised held_out_falls (guards.stop_on): since the start")


def test_the_line_of_a_round_is_followed_by_its_alarms(copied: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    with Progress(console) as progress:
        run(diverging_config(copied), python_objects(), observe=progress)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[0] == "1")
    assert lines[at + 1].startswith(
        "round 1, look: the held-out reward falls while the trained one rises: since the start"
    )
    assert lines[at + 2].startswith("round 1, look: one reward decides nearly alone: loud accounts for")


def test_to_stop_on_an_alarm_is_decided_again_without_any_work(copied: Path) -> None:
    seen: list[str] = []
    config = diverging_config(copied, guards={"stop_on": ["held_out_falls"]})
    outcome = run(config, python_objects(), observe=lambda kind, facts: seen.append(kind))
    assert outcome.rounds == 1
    assert "stage_begin" not in seen


@pytest.mark.slow
def test_a_run_of_a_version_without_guards_gets_them_and_nothing_else_changes(copied: Path) -> None:
    before, whole = tree_hash(copied), copied.parent / "whole"
    shutil.copytree(copied, whole)
    without_guards(copied)
    stages: list[str] = []
    changes: list[dict[str, Any]] = []

    def observe(kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin":
            stages.append(facts["stage"])
        if kind == "begin":
            changes.append(facts["changed"])

    resume(copied, python_objects(), observe=observe)
    assert stages == ["guard"] * ROUNDS
    assert changes == [{}]  # a section that the version did not know is no change that a person made
    after = tree_hash(copied)
    assert {name for name in before if before[name] != after.get(name)} <= {"events.jsonl", "config.yaml"}


@pytest.mark.slow
def test_a_round_whose_guard_looked_at_less_stays_as_it_is_and_other_thresholds_are_still_refused(copied: Path) -> None:
    """A version before `empty_share`, `cut_off_share` and the others wrote COMMITs without them."""
    folder, known = RunFolder(copied), ("guards.diversity_drop", "guards.false_alarms", "guards.part_share")
    for round_ in (1, 2, 3):
        commit = folder.commit(round_, "guard")
        assert commit is not None
        fields = {name: value for name, value in commit.fields.items() if name in known}
        inputs = {name: folder.commit_hash(int(name.split("/")[0]), name.split("/", 1)[1]) for name in commit.inputs}
        inputs = {name: value for name, value in inputs.items() if not name.endswith("/model")}
        folder.seal(
            Manifest(commit.stage, round_, stage_key("guard", fields, inputs), fields, inputs, commit.files), "guard"
        )
    seen: list[str] = []
    assert (
        run(diverging_config(copied), python_objects(), observe=lambda kind, facts: seen.append(kind)).rounds == ROUNDS
    )
    assert "stage_begin" not in seen
    with pytest.raises(ConfigChanged, match=r"guards\.part_share: 0\.9 → 0\.95"):
        run(diverging_config(copied, guards={"part_share": 0.95}), python_objects())


@pytest.mark.slow
def test_other_thresholds_are_refused_until_the_guards_are_redone_and_then_nothing_else_is(copied: Path) -> None:
    config = diverging_config(copied, guards={"part_share": 1.0})
    with pytest.raises(ConfigChanged, match=r"guard of round 1 .* guards\.part_share: 0\.9 → 1\.0.*--from 1/guard"):
        run(config, python_objects())
    stages: list[str] = []
    run(config, python_objects(), redo="1/guard", observe=lambda kind, facts: stages.append(facts.get("stage", "")))
    assert set(stages) <= {"", "guard"}
    assert [alarm["alarm"] for alarm in alarms_of(RunFolder(copied), 1)] == ["held_out_falls"]


@pytest.mark.slow
def test_without_guards_there_are_none(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(diverging_config(root, guards={"enabled": False}), python_objects())
    assert not list(root.glob("round-*/guard"))


def test_a_budget_of_kl_is_watched_where_there_is_one(tmp_path: Path) -> None:
    run(diverging_config(tmp_path / "run", num_rounds=1, guards={"max_kl": 0.001}), python_objects())
    found = {alarm["alarm"]: alarm for alarm in alarms_of(RunFolder(tmp_path / "run"), 1)}
    assert found["kl_beyond_budget"]["numbers"]["budget"] == 0.001
    assert found["kl_beyond_budget"]["samples"][0]["why"].startswith("log p - log p0 is ")


def test_a_teacher_s_completions_are_kept_and_are_no_samples_of_the_policy(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.config(root, **tiny.EVERYTHING), tiny.objects())
    sets = json.loads((root / "round-0001/guard/metrics.json").read_text())
    assert sets["generated"]["samples"] == 8 * 4


@pytest.mark.parametrize(
    ("guards", "changes", "words"),
    [
        ({"stop_on": ["held_out_falls"]}, {"evaluation": {"reward_funcs": []}}, "needs a held-out reward"),
        (
            {"stop_on": ["kl_beyond_budget"]},
            {"evaluation": {"kl": False}},
            "kl_beyond_budget needs evaluation.kl: true",
        ),
        ({"max_kl": 3.0}, {"evaluation": {"kl": False}}, "guards.max_kl needs evaluation.kl: true"),
        ({"stop_on": ["part_dominates"], "enabled": False}, {}, "guards.stop_on needs guards.enabled: true"),
        ({"stop_on": ["hacking"]}, {}, "must be 'held_out_falls', "),
        ({"diversity_drop": 40}, {}, "It is a fraction, not a percentage: write 0.4."),
        ({"part_share": 90}, {}, "It is a fraction, not a percentage: write 0.9."),
        ({"length_factor": 0.5}, {}, "must be greater than 1; got 0.5"),
        ({"false_alarms": 5}, {}, "must be less than or equal to 0.5; got 5"),
        ({"max_kl": 0}, {}, "must be greater than 0; got 0"),
    ],
)
def test_what_can_never_be_raised_or_measured_is_refused(
    tmp_path: Path, guards: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        diverging_config(tmp_path / "run", guards=guards, **changes)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("stop_on", "rewards", "words"),
    [
        ("diversity_drops", [loud, even], "guards.stop_on: diversity_drops is about texts and images"),
        ("part_dominates", [loud], "guards.stop_on: part_dominates needs two rewards"),
    ],
)
def test_what_this_family_or_these_rewards_cannot_raise_is_refused(
    tmp_path: Path, stop_on: str, rewards: list[Any], words: str
) -> None:
    config = diverging_config(tmp_path / "run", guards={"stop_on": [stop_on]})
    with pytest.raises(ConfigError, match=words):
        run(config, PythonObjects(train=python_objects().train, held_out=python_objects().held_out, rewards=rewards))


def test_the_command_shows_evidence_and_samples(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alarms", str(finished), "--round", "1", "-n", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 alarms in round 1" in out
    assert "The held-out reward falls while the trained one rises" in out
    assert "and 6 more" in out
    for alarm in alarms_of(RunFolder(finished), 1):
        assert all(item["sample_id"] in out for item in alarm["samples"][:2])


def test_as_json_it_gives_what_is_on_disk(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alarms", str(finished), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [alarm for r in range(1, ROUNDS + 1) for alarm in alarms_of(RunFolder(finished), r)]


def test_runs_counts_the_alarms(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(finished.parent), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert status["alarms"] == sum(len(alarms_of(RunFolder(finished), r)) for r in range(1, ROUNDS + 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--round", "9"], "--round must be one of 1 … 3; got 9"), (["-n", "0"], "--number must be at least 1")],
)
def test_the_command_says_what_it_cannot_show(
    finished: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["alarms", str(finished), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_run_without_guarded_rounds_says_how_to_get_them(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_guards(copied)
    assert main(["alarms", str(copied)]) == 2
    assert "--guards.enabled true" in capsys.readouterr().err
