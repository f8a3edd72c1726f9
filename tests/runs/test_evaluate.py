"""Evaluations: reference answers in every round, runs of no rounds, and rounds of other runs judged again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raftune.cli import main
from raftune.config import RunConfig
from raftune.errors import ConfigChanged, ConfigError, DataError, StoreError
from raftune.policies.tabular.policy import Tabular
from raftune.results.status import status_of
from raftune.runtime import assembly
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.evaluation_target import evaluation_of, parse_target
from raftune.runtime.run import resume, run, verify
from raftune.store.run import RunFolder
from tests.builders import save_tiny, tiny_llama, tiny_tokenizer
from tests.runs import tiny
from tests.runs.test_causal_lm_runs import OBJECTS, config, shortness

LOGITS = [[0.0, 1.0, 2.0], [1.0, 0.5, -1.0]]
JUDGED = PythonObjects(rewards=[tiny.value])


def metrics(root: Path, round_: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / f"round-{round_:04d}/evaluate/metrics.json").read_text())
    return loaded


def evaluated_with_references(root: Path, column: list[Any], **changes: Any) -> Path:
    """A run of no rounds on two labels with these reference answers."""
    table = pa.table({"prompt": [0, 1], "answer": column})
    policy = {"family": "tabular", "logits": LOGITS}
    sections = {"policy": policy, "num_rounds": 0, "evaluation": {"reference_column": "answer"}, **changes}
    run(tiny.config(root, **sections), PythonObjects(lambda: table, lambda: table, [tiny.value]))
    return root


# -- the perplexity of reference answers ------------------------------------------------------------------------------


def test_the_perplexity_is_that_of_the_closed_form(tmp_path: Path) -> None:
    found = metrics(evaluated_with_references(tmp_path / "run", [2, 0]))["perplexity"]
    nats = [math.log(sum(map(math.exp, row))) - row[answer] for row, answer in zip(LOGITS, (2, 0), strict=True)]
    assert found["mean"] == pytest.approx(math.exp(sum(nats) / 2), rel=1e-12)
    assert (found["low"], found["high"], found["n"]) == (None, None, 2)


def test_every_round_is_measured_on_the_same_completions(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", evaluation={"reference_column": "human"}), tiny.objects())
    for round_ in range(3):
        table = pq.read_table(tmp_path / f"run/round-{round_:04d}/evaluate/reference")
        policy = Tabular.load(None, tmp_path / f"run/round-{round_:04d}/model", tmp_path)  # type: ignore[arg-type]
        assert table.column("reference_log_prob").to_pylist() == policy.log_p[:, 0].tolist()
        assert table.column("tokens").to_pylist() == [1, 1, 1, 1]


def test_the_perplexity_of_a_language_model_is_that_of_transformers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    table = pa.table({"prompt": ["say a", "say b"], "answer": ["a it is", "no"]})
    settings = config(tmp_path / "run", model, num_rounds=0, evaluation={"reference_column": "answer"})
    run(settings, PythonObjects(lambda: table, lambda: table, [shortness]))
    tokenizer, weights = tiny_tokenizer(), tiny_llama()
    nats, tokens = 0.0, 0
    for prompt, answer in zip(table["prompt"].to_pylist(), table["answer"].to_pylist(), strict=True):
        head, tail = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = weights(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
        nats -= float(logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).double().sum())
        tokens += len(tail)
    assert metrics(tmp_path / "run")["perplexity"]["mean"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_completions_that_are_empty_or_too_long_are_left_out_and_counted(tmp_path: Path) -> None:
    notes: list[str] = []
    table = pa.table({"prompt": [0, 1, 0, 1], "answer": [2, None, 7, 0]})
    settings = tiny.config(
        tmp_path / "run",
        policy={"family": "tabular", "logits": LOGITS},
        num_rounds=0,
        evaluation={"reference_column": "answer"},
    )
    run(
        settings,
        PythonObjects(lambda: table, lambda: table, [tiny.value]),
        observe=lambda kind, facts: notes.extend(facts.get("notes", ())),
    )
    assert metrics(tmp_path / "run")["references"] == {"measured": 2, "left_out": 2, "impossible": 0}
    assert notes == [
        "2 of 4 held-out prompts of chunk 0 have no usable completion in 'answer', and are left out of the perplexity: "
        "the answer is empty"
    ]
    details = pq.read_table(tmp_path / "run/round-0000/evaluate/reference").column("detail").to_pylist()
    assert details[0] == details[3] == ""
    assert "must be an index in 0 … 2; got 7" in details[2]


@pytest.mark.parametrize(
    ("answers", "column", "words"),
    [
        ([0, 1], "reply", "must name a column of the held-out prompts; got 'reply', and they have answer. Name one"),
        ([None, None], "answer", "must hold completions; the 2 held-out prompts have none in 'answer'"),
    ],
)
def test_a_column_that_holds_no_completions_is_refused_before_generation(
    tmp_path: Path, answers: list[Any], column: str, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        evaluated_with_references(tmp_path / "run", answers, evaluation={"reference_column": column})
    assert not (tmp_path / "run/round-0000/evaluate").exists()


class WithoutLogProbs:
    """A family that knows no likelihoods."""

    media, payload = Tabular.media, Tabular.payload
    start, load, verify = Tabular.start, Tabular.load, Tabular.verify


def test_a_family_without_likelihoods_is_refused_a_reference(tmp_path: Path) -> None:
    policy = {"family": f"{__name__}:WithoutLogProbs"}
    with pytest.raises(ConfigError, match=r"evaluation\.reference_column must be left out .* got 'human' with policy"):
        run(tiny.config(tmp_path / "run", policy=policy, evaluation={"reference_column": "human"}), tiny.objects())


def test_a_finished_run_is_measured_on_references_without_being_generated_again(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.config(root), tiny.objects())
    generated = [path.stat().st_ino for path in sorted(root.glob("round-*/evaluate/generate/*"))]
    settings = tiny.config(root, evaluation={"reference_column": "human"})
    with pytest.raises(ConfigChanged, match="it now also reads 0/evaluate/reference"):
        run(settings, tiny.objects())
    run(settings, tiny.objects(), redo="evaluate")
    assert all(
        metrics(root, round_)["references"]["measured"] + metrics(root, round_)["references"]["impossible"] == 4
        for round_ in range(3)
    )
    assert generated == [path.stat().st_ino for path in sorted(root.glob("round-*/evaluate/generate/*"))]


def test_a_version_that_measures_more_leaves_an_old_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    with monkeypatch.context() as older:
        older.setattr(assembly, "METRICS", {"rewards": assembly.METRICS["rewards"]})
        run(tiny.config(root), tiny.objects())
    assert "entropy" not in metrics(root, 2)
    resume(root, tiny.objects())
    assert "entropy" not in metrics(root, 2)
    resume(root, tiny.objects(), redo="2/evaluate")
    assert "entropy" in metrics(root, 2)
    assert verify(root) == []


# -- runs of no rounds ------------------------------------------------------------------------------------------------


def test_a_run_of_no_rounds_judges_the_start_and_is_finished(tmp_path: Path) -> None:
    outcome = run(tiny.config(tmp_path / "run", num_rounds=0), tiny.objects())
    assert (outcome.rounds, outcome.best, outcome.reason) == (0, 0, "the start is judged")
    assert status_of(tmp_path / "run").state == "finished"
    assert verify(tmp_path / "run") == []


def test_a_run_of_no_rounds_can_learn_afterwards_what_a_new_one_would(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "a", num_rounds=0), tiny.objects())
    run(tiny.config(tmp_path / "a"), tiny.objects())
    run(tiny.config(tmp_path / "b"), tiny.objects())
    assert metrics(tmp_path / "a", 2) == metrics(tmp_path / "b", 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"prompts": None}}, "data.prompts must be given; it has no default"),
        ({"num_rounds": 0, "data": {"prompts": None}}, "evaluation.prompts must name the prompts to judge by"),
        (
            {"num_rounds": 0, "evaluation": {"num_prompts": 0}},
            "evaluation.num_prompts must be above 0 where num_rounds",
        ),
        ({"evaluation": {"num_prompts": 0, "reference_column": "human"}}, "reference_column needs held-out prompts"),
    ],
)
def test_a_run_with_nothing_to_do_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny.config(tmp_path / "run", **changes)


# -- rounds of other runs ---------------------------------------------------------------------------------------------


def judge_again(reference: str, root: Path, objects: PythonObjects, **flags: Any) -> RunConfig:
    settings = evaluation_of(parse_target(reference), [], {"output_dir": str(root), **flags})
    run(settings, objects)
    return settings


def same_but_for_kl(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return {**a, "kl": None, "kl_per_token": None} == {**b, "kl": None, "kl_per_token": None}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_round_evaluated_again_generates_the_samples_of_its_run(tmp_path: Path, lora: bool) -> None:
    policy = {"adapter": {"r": 4}} if lora else {}
    model = save_tiny(tmp_path / "model", "llama")
    run(config(tmp_path / "run", model, policy=policy), OBJECTS)
    judge_again(f"{tmp_path / 'run'}@2", tmp_path / "again", OBJECTS)
    assert same_but_for_kl(metrics(tmp_path / "again"), metrics(tmp_path / "run", 2))
    generated = [
        pq.read_table(folder).drop_columns(["sample_id", "version"])
        for folder in (tmp_path / "again/round-0000/evaluate/generate", tmp_path / "run/round-0002/evaluate/generate")
    ]
    assert generated[0].equals(generated[1])
    weights = tmp_path / "again/round-0000/model"
    assert (weights / "adapter_model.safetensors").is_file() == lora
    assert not (weights / "model.safetensors").is_file()  # neither merged nor copied


@pytest.mark.slow
def test_an_adapter_of_a_run_that_holds_its_own_base_is_evaluated_again_on_it(tmp_path: Path) -> None:
    """The start was given as an object: its weights lie in the run, and adapters name it from where they lie."""
    objects = PythonObjects(train=OBJECTS.train, rewards=[shortness], model=tiny_llama(3), tokenizer=tiny_tokenizer())
    settings = config(tmp_path / "run", Path("given"), policy={"adapter": {"r": 4}})
    run(settings, objects)
    judge_again(f"{tmp_path / 'run'}@1", tmp_path / "again", OBJECTS)
    assert same_but_for_kl(metrics(tmp_path / "again"), metrics(tmp_path / "run", 1))


def test_a_round_of_a_table_is_evaluated_again_with_its_impossible_completions(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    judge_again(str(tmp_path / "run@2"), tmp_path / "again", JUDGED)
    ours, theirs = metrics(tmp_path / "again"), metrics(tmp_path / "run", 2)
    assert {name: theirs[name] for name in ours} == ours
    assert "reward" in ours


def test_the_best_round_is_meant_where_none_is_named(tmp_path: Path) -> None:
    outcome = run(tiny.config(tmp_path / "run"), tiny.objects())
    subject = parse_target(str(tmp_path / "run"))
    assert subject.round == outcome.best > 0
    assert parse_target(str(tmp_path / "run@start")).round == 0
    assert parse_target(str(tmp_path / "run@last")).round == 2


def test_an_evaluation_inherits_how_the_run_samples_and_judges_and_nothing_of_how_it_learns(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"seed": 5, "selection": {"rule": "top_m", "m": 2}, "stop": {"max_kl": 9.0}}
    sampling = {"temperature": 0.5, "candidate_columns": ["human"]}
    run(tiny.config(tmp_path / "run", sampling=sampling, evaluation={"seed": 7}, **changes), tiny.objects())
    found = evaluation_of(parse_target(str(tmp_path / "run@1")), [], {"evaluation.num_generations": "3"})
    assert (found.sampling.temperature, found.evaluation.seed, found.evaluation.num_generations) == (0.5, 7, 3)
    assert (found.selection.rule, found.stop.max_kl, found.sampling.candidate_columns) == ("best_of_k", None, ())
    assert (found.name, found.num_rounds) == ("evaluation-run-round-1", 0)


def test_files_and_flags_go_over_what_a_run_brings_along(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run"), tiny.objects())
    file = tmp_path / "more.yaml"
    file.write_text("name: other\nnum_rounds: 9\nstop: {max_kl: 1}\nevaluation: {seed: 3, num_generations: 5}\n")
    found = evaluation_of(parse_target(str(tmp_path / "run")), [file], {"evaluation.seed": "4"})
    assert (found.evaluation.seed, found.evaluation.num_generations, found.num_rounds) == (4, 5, 0)
    assert found.name.startswith("evaluation-run")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("training.learning_rate", "means nothing to an evaluation, which learns nothing"),
        ("sampling.num_generations", "Completions are counted by --evaluation.num_generations"),
        ("seed", "Completions are generated by --evaluation.seed"),
        ("sampling.teacher.model", "means nothing"),
    ],
)
def test_a_flag_of_learning_is_refused_with_what_to_write_instead(flag: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluation_of(parse_target("model"), [], {flag: "1"})


def test_a_round_without_weights_is_refused(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", keep_models="last"), tiny.objects())
    with pytest.raises(StoreError, match=r"the weights of round 1 of .* were dropped"):
        parse_target(str(tmp_path / "run@1"))
    with pytest.raises(ConfigError, match=r"must name best, last, start or a round that is done \(0, 1, 2\); got '7'"):
        parse_target(str(tmp_path / "run@7"))


def test_a_run_that_held_nothing_out_says_so(tmp_path: Path) -> None:
    run(tiny.config(tmp_path / "run", evaluation={"num_prompts": 0}), tiny.objects())
    settings = evaluation_of(parse_target(str(tmp_path / "run@1")), [], {"output_dir": str(tmp_path / "again")})
    with pytest.raises(DataError, match=r"evaluation\.prompts names the run .*, which has no held-out prompts"):
        run(settings, JUDGED)


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "rewards.py").write_text(
        "def value(prompts, completions, **columns):\n    return [float(answer) for answer in completions]\n"
    )
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"prompt": i, "human": 1}) + "\n" for i in (2, 3)))
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {
        "rewards": {"reward_funcs": ["rewards.py:value"]},
        "policy": {"family": "tabular", "num_prompts": 4, "num_answers": 5, "step": 0.5},
    }
    run(tiny.config(Path("runs/tab"), name="tab", **changes), PythonObjects(tiny.train, tiny.held_out))
    yield tmp_path


def evaluated(capsys: pytest.CaptureFixture[str], *tokens: str, code: int = 0) -> tuple[str, str]:
    found = main(["evaluate", *tokens])
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def test_the_table_says_value_interval_and_meaning_and_the_worth_of_a_larger_k(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = evaluated(capsys, "runs/tab@1", "--evaluation.num_generations", "8")
    found = metrics(folder / "runs/evaluation-tab-round-1")
    reward = found["reward"]
    assert f"{reward['mean']:.3f}" in out
    assert "none, n = 4" in out and reward["n"] == 4
    curve = found["best_of_k"]
    gain = (curve["4"]["mean"] - curve["1"]["mean"]) / (curve["8"]["mean"] - curve["1"]["mean"])
    assert f"K=4 gives {100 * gain:.0f} % of the gain of K=8." in out


def test_an_overlap_with_the_prompts_of_the_run_is_reported_with_counts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = evaluated(capsys, "runs/tab@1", "--evaluation.prompts", "new.jsonl")
    assert "2 of 2 held-out prompts are also trained on" in out
    assert err.count("also trained on") == 1


@pytest.mark.slow
def test_a_program_can_read_an_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(evaluated(capsys, "runs/tab@2", "--evaluation.reference_column", "human", "--json")[0])
    assert found["subject"] == {"words": "round 2 of runs/tab", "run": "runs/tab", "round": 2}
    assert found["metrics"] == metrics(folder / found["run"])
    assert found["metrics"]["perplexity"]["mean"] > 1
    assert (found["prompts"], found["overlap"], found["worked"]) == (4, 4, True)
    assert found["gains"]["1"] == 0
    again = json.loads(evaluated(capsys, "runs/tab@2", "--evaluation.reference_column", "human", "--json")[0])
    assert again == {**found, "worked": False}


def test_an_evaluation_never_writes_into_a_run_that_learns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.walk("runs/tab"))
    _, err = evaluated(capsys, "runs/tab@1", "--output-dir", "runs/tab", code=2)
    assert "holds a run of 2 rounds. Choose another with --output-dir" in err
    assert sorted(os.walk("runs/tab")) == before


def test_a_model_needs_prompts_to_be_judged_by(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = evaluated(capsys, "starter", "--rewards.reward_funcs", "starter", code=2)
    assert "evaluation.prompts must name the prompts to judge by; got none" in err


@pytest.mark.slow
def test_another_subject_needs_another_directory(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(capsys, "runs/tab@1", "--output-dir", "runs/x")
    _, err = evaluated(capsys, "runs/tab@2", "--output-dir", "runs/x", code=2)
    assert "policy.logits" in err
    evaluated(capsys, "runs/tab@2", "--output-dir", "runs/x", "--from", "start")
    assert RunFolder("runs/x").read_config()["policy"]["logits"] is not None
    assert (folder / "runs/x/superseded").is_dir()
