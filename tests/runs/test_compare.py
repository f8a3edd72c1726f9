"""`raftune compare` on tabular runs, with a judge behind `transformers serve`, and as a gate."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from raftune.analysis.compare import Comparison, compare
from raftune.analysis.compare.compare import FIELDS, check, read_gate
from raftune.cli import main
from raftune.config.rewards import RewardSpec
from raftune.errors import ConfigError, DataError, RewardError, RunDamaged, StoreError
from raftune.results.samples import held_out_chunks
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.chat_server import ChatServer, chat_server
from tests.runs.kill import tree
from tests.unit.clients.servers import chat, closed_url, question_of, serving

REWARDS = """
def value(prompts, completions, **columns):
    return [float(answer) for answer in completions]

def even(prompts, completions, **columns):
    return [float(answer % 2 == 0) for answer in completions]

def picky(prompts, completions, **columns):
    return [None if answer == 0 else float("nan") if answer == 4 else float(answer) for answer in completions]

def broken(prompts, completions, **columns):
    raise RuntimeError("out of order")
"""
LABELS = 16


def labels(*numbers: int) -> Any:
    return lambda: pa.table({"prompt": list(numbers), "note": [f"note {number}" for number in numbers]})


def go(root: Path, *, held_out: range = range(8), objects: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A run of two rounds on sixteen labels that learns slowly, judged on the first eight with three answers each."""
    policy = {"family": "tabular", "num_prompts": LABELS, "num_answers": 5, "step": 0.4}
    evaluation = {"num_prompts": len(held_out), "num_generations": 3, **changes.pop("evaluation", {})}
    given = PythonObjects(train=labels(*range(LABELS)), held_out=labels(*held_out), rewards=[tiny.value])
    run(
        tiny.config(root, policy=policy, evaluation=evaluation, prompts_per_round=LABELS, **changes),
        replace(given, **(objects or {})),
    )
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    return go(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def output_of(capsys: pytest.CaptureFixture[str], *tokens: object, code: int = 0) -> tuple[str, str]:
    found = main(["compare", *map(str, tokens)])
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


def result_of(found: Comparison, name: str) -> Any:
    return next(measure.result for measure in found.measures if measure.name == name)


# -- pairs -------------------------------------------------------------------------------------------------------------


def test_a_run_alone_is_its_best_round_against_its_start(base: Path) -> None:
    found = compare(str(base))
    best = json.loads((base / "best.json").read_text())["round"]
    assert (found.pairs.side_a.round, found.pairs.side_b.round) == (best, 0)
    assert best > 0
    assert (len(found.pairs), len(found.pairs.prompts)) == (24, 8)
    assert found.differences == []


def test_what_is_compared_is_what_the_rounds_recorded(base: Path) -> None:
    """The numbers, counted by hand from the ledger."""
    found = compare(f"{base}@2", f"{base}@start")
    after, before = (
        {(s["prompt_id"], s["k"]): s["score"] for chunk in held_out_chunks(RunFolder(base), round_) for s in chunk}
        for round_ in (2, 0)
    )
    signs = np.array([np.sign(after[key] - before[key]) for key in after])
    result = result_of(found, "reward")
    np.testing.assert_allclose(
        [result.wins, result.ties, result.losses], [np.mean(signs == sign) for sign in (1, 0, -1)], atol=1e-12
    )
    assert result.difference.mean == pytest.approx(np.mean([after[key] - before[key] for key in after]))
    assert result.a.mean == pytest.approx(np.mean(list(after.values())))
    metrics = json.loads((base / "round-0002/evaluate/metrics.json").read_text())
    assert (result.a.low, result.a.high) == (metrics["reward"]["low"], metrics["reward"]["high"])


def test_both_sides_were_generated_with_the_same_seeds(base: Path) -> None:
    found = compare(str(base))
    rows = [side.samples.to_pylist() for side in (found.pairs.side_a, found.pairs.side_b)]
    for a, b in zip(found.pairs.a, found.pairs.b, strict=True):
        assert all(rows[0][a][name] == rows[1][b][name] for name in ("prompt_id", "k", "seed"))


def test_a_run_against_itself_under_another_seed_of_training_is_a_pair(base: Path, tmp_path: Path) -> None:
    """Both starts are the same policy, and their answers are the same: ties throughout."""
    other = go(tmp_path / "other", seed=5)
    result = result_of(compare(f"{base}@start", f"{other}@start"), "reward")
    assert (result.ties, result.p, result.difference.mean) == (1.0, 1.0, 0.0)
    assert result_of(compare(str(base), str(other)), "reward").pairs == 24


def test_an_evaluation_is_a_side_by_itself(base: Path, tmp_path: Path) -> None:
    judged = go(tmp_path / "judged", num_rounds=0)
    found = compare(str(base), str(judged))
    assert found.pairs.side_b.words == f"{judged}, an evaluation"
    assert result_of(found, "reward").pairs == 24


def test_what_differs_is_reported_with_counts(base: Path, tmp_path: Path) -> None:
    other = go(
        tmp_path / "other", held_out=range(2, 12), evaluation={"num_generations": 2}, sampling={"num_generations": 5}
    )
    found = compare(str(base), str(other))
    assert (len(found.pairs), len(found.pairs.prompts)) == (12, 6)
    assert found.differences == [
        "prompts: 6 in common are compared; 2 are in A alone, 4 in B alone",
        "completions: 3 a prompt in A, 2 in B; the first 2 of each are compared",
    ]


def test_other_options_and_other_columns_are_reported(base: Path, tmp_path: Path) -> None:
    plain = {"held_out": lambda: pa.table({"prompt": list(range(8))})}
    other = go(tmp_path / "other", objects=plain, sampling={"temperature": 0.7})
    assert compare(str(base), str(other)).differences == [
        "sampling.temperature: 1.0 in A, 0.7 in B",
        "columns: of 8 prompts other than the prompt's text differ; A's go to the rewards that score now",
    ]


def test_nothing_in_common_is_an_error_that_says_what_to_do(base: Path, tmp_path: Path) -> None:
    prompts = go(tmp_path / "prompts", held_out=range(8, 16))
    with pytest.raises(
        DataError, match=r"no prompt in common: 8 in A, 8 in B.*raftune evaluate … --evaluation.prompts"
    ):
        compare(str(base), str(prompts))
    seeds = go(tmp_path / "seeds", evaluation={"seed": 1})
    with pytest.raises(
        DataError, match=r"share 8 prompts, and no seed: evaluation.seed is 0 in A and 1 in B.*seed 1\."
    ):
        compare(str(base), str(seeds))


@pytest.mark.parametrize(
    ("reference", "error", "said"),
    [
        ("{base}@7", ConfigError, "A: round 7 of {base} was not evaluated; there are 0 … 2. Choose one."),
        ("{base}@bets", ConfigError, "got 'bets'. Did you mean {base}@best?"),
        (
            "{base}@-1",
            ConfigError,
            "A: a round is a number, best, last or start; got '-1'. Write {base}@2, for example.",
        ),
        ("{base}@start", ConfigError, "A and B must differ; both are {base}, the start (the start is its best round)."),
        ("{base}nowhere", StoreError, "holds no run"),
        (__file__, StoreError, "holds no run: it is a file"),
    ],
)
def test_a_side_that_is_not_there_is_named(base: Path, reference: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=re.escape(said.format(base=base))):
        compare(reference.format(base=base))


def test_a_run_that_was_never_evaluated_says_how_to_evaluate_it(tmp_path: Path) -> None:
    blind = go(tmp_path / "blind", evaluation={"num_prompts": 0})
    with pytest.raises(StoreError, match=re.escape(f"A: {blind} holds no evaluation yet. `raftune evaluate {blind}`")):
        compare(str(blind))


@pytest.mark.parametrize("name", ["generate/chunk-00001.parquet", "score/chunk-00000.parquet", "plan/prompts.parquet"])
def test_a_file_that_was_lost_is_named_and_never_passed_over(base: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    (copy / "round-0000" / "evaluate" / name).unlink()
    with pytest.raises(RunDamaged, match=re.escape(name)):
        compare(str(copy))


def test_a_folder_with_an_at_in_its_name_is_a_folder(base: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd@best"
    odd.symlink_to(base)
    assert compare(str(odd)).pairs.side_a.round == compare(f"{odd}@best").pairs.side_a.round


# -- measures ----------------------------------------------------------------------------------------------------------


def even(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
    return [float(answer % 2 == 0) for answer in completions]


def test_the_parts_of_a_score_are_measures_by_name(tmp_path: Path) -> None:
    summed = go(tmp_path / "summed", objects={"rewards": [tiny.value, even], "reward_weights": [1.0, 2.0]})
    found = {measure.name: measure for measure in compare(f"{summed}@2", f"{summed}@start").measures}
    assert list(found) == ["reward", "reward/value", "reward/even"]
    assert found["reward/even"].aliases == ("even",)
    total, value, half = (found[name].result for name in found)
    assert total is not None and value is not None and half is not None
    assert total.a is not None and value.a is not None and half.a is not None
    assert total.a.mean == pytest.approx(value.a.mean + 2 * half.a.mean)


@pytest.mark.slow
def test_parts_of_equal_spec_are_compared_where_their_sums_are_not(tmp_path: Path, rewards: Path) -> None:
    """Two evaluations whose weights differ: each reward has a process of its own, which takes its time to start."""
    sides = []
    for weight in (1.0, 2.0):
        funcs = [f"{rewards}:value", {"spec": f"{rewards}:even", "weight": weight}]
        config = {"num_rounds": 0, "rewards": {"reward_funcs": funcs}}
        sides.append(go(tmp_path / f"weight-{weight:g}", objects={"rewards": ()}, **config))
    found = {measure.name: measure for measure in compare(*map(str, sides)).measures}
    assert found["reward"].result is None
    assert "value + even changed between A and B (code, options or weights)" in found["reward"].why
    for part in ("value", "even"):
        result = found[f"reward/{part}"].result
        assert result is not None
        assert result.ties == 1.0  # the same policy and seeds


def test_scores_of_different_rewards_are_not_compared(base: Path, tmp_path: Path) -> None:
    def negative(prompts: list[int], completions: list[int], **columns: Any) -> list[float]:
        return [-float(answer) for answer in completions]

    other = go(tmp_path / "other", objects={"rewards": [negative]})
    with pytest.raises(
        DataError, match=r"no score in common.\n  reward: A was scored by value, B by negative. `--reward"
    ):
        compare(str(base), str(other))


@pytest.mark.slow
def test_a_new_reward_scores_both_sides_and_the_runs_stay_as_they_are(base: Path, rewards: Path) -> None:
    before = tree(base)
    found = compare(str(base), rewards=[f"{rewards}:value", RewardSpec(spec=f"{rewards}:picky", name="reward")])
    assert tree(base) == before
    assert [measure.name for measure in found.measures] == ["reward", "value", "reward_2"]
    assert result_of(found, "value") == result_of(found, "reward")  # the same function, then and now
    a, b = (np.array(answers) for answers in found.pairs.answers)
    unscored = np.isin(a, (0, 4)) | np.isin(b, (0, 4))  # None and NaN: such a pair is left out, and is no tie
    assert found.measures[2].facts["left_out"] == unscored.sum() > 0
    assert result_of(found, "reward_2").pairs == (~unscored).sum()


def test_a_reward_that_cannot_score_half_of_the_completions_is_an_error(base: Path, rewards: Path) -> None:
    with pytest.raises(
        RewardError, match=r"--reward broken could not score 48 of 48 completions.\n  error: RuntimeError: out"
    ):
        compare(str(base), rewards=[f"{rewards}:broken"])


# -- gates -------------------------------------------------------------------------------------------------------------


def test_an_open_gate_passes_and_a_closed_one_ends_with_3(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, base, "--fail-if", "reward.win_rate < 0.5", "--fail-if", "value.p > 0.9")
    assert re.search(r"gate passed: reward.win_rate < 0.5: reward.win_rate is 0\.\d+\.", out)
    out, err = output_of(capsys, base, "--fail-if", "reward.win_rate<=1", "--fail-if", "reward.ties == 2", code=3)
    assert re.search(r"gate failed: reward.win_rate<=1: reward.win_rate is 0\.\d+\.", err)
    assert "gate passed: reward.ties == 2" in out


def test_what_could_not_be_computed_closes_the_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = go(tmp_path / "few", held_out=range(4))
    _, err = output_of(capsys, f"{few}@2", f"{few}@1", "--fail-if", "reward.difference.low < -100", code=3)
    assert "reward.difference.low could not be computed: 4 prompts are too few for an interval, which needs 6" in err


def test_every_field_of_the_table_can_be_a_gate(base: Path) -> None:
    [measure] = compare(str(base)).measures
    for field in FIELDS:
        found = check(read_gate(f"reward.{field} > -1000"), measure)
        assert found.closed, field
        assert (found.value is None) == (field in ("inconsistent", "failures"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("reward.win_rate", "Write it in quotes, such as 'reward.win_rate < 0.5'."),
        ("reward.win_rate = 0.5", "must be MEASURE.FIELD, one of <= >= == != < >, NUMBER"),
        ("reward.winrate < 0.5", "'winrate' is not a field; did you mean reward.win_rate?"),
        ("reward.difference.lo < 0", "did you mean reward.difference.low?"),
        ("reward < 0.5", "must name a field of reward"),
        ("reward.win_rate < 50%", "A rate is a fraction: write 0.5 for 50 %."),
        ("reward.win_rate < nan", "must compare with a finite number; got 'nan'"),
        ("rewrad.win_rate < 0.5", "there is no measure 'rewrad'; did you mean 'reward'?"),
        ("judge.win_rate < 0.5", "there is no measure 'judge'; there are reward."),
        ("__import__('os').p < 0.5", "there is no measure"),
        ("", "must be MEASURE.FIELD"),
    ],
)
def test_a_gate_that_cannot_be_meant_is_refused_with_2(
    base: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    assert main(["compare", str(base), "--fail-if", text]) == 2
    assert said in capsys.readouterr().err


def test_a_measure_may_have_dots_in_its_name() -> None:
    gate = read_gate("my.reward.v2.win_rate.low>=-1e-3")
    assert (gate.measure, gate.field, gate.operator, gate.number) == ("my.reward.v2", "win_rate.low", ">=", -0.001)


# -- what is printed and written ---------------------------------------------------------------------------------------


def test_the_table_fits_a_hundred_columns(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    out, err = output_of(capsys, "base", "--show", 2)
    assert err == ""
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("A  base, round ")
    assert lines[1] == "B  base, the start"
    assert lines[2] == "24 pairs: 8 prompts, 3 completions each, the same seeds"
    assert lines[4].split() == ["measure", "A", "B", "A", "-", "B", "win/tie/loss", "A's", "win", "rate", "p"]
    assert "A is furthest ahead by reward (value) on:" in lines


def test_the_prompts_that_stand_out_show_the_pair_that_says_most(base: Path) -> None:
    found = compare(f"{base}@2", f"{base}@start")
    ahead, behind = found.extremes(3)
    leads = [lead for _, lead in ahead]
    assert leads == sorted(leads, reverse=True) and all(lead > 0 for lead in leads)
    assert all(lead < 0 for _, lead in behind)
    a, b = found.pairs.answers
    for prompt, lead in ahead:
        row = found.telling(prompt, lead)
        rows = np.flatnonzero(found.pairs.groups == prompt)
        assert a[row] - b[row] == max(a[i] - b[i] for i in rows)


def test_a_shown_pair_says_its_own_lead_beside_the_mean_of_its_prompt(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pair scored 4 against 0 stood under the mean lead of its prompt, +1.750, and nothing said so."""
    out, _ = output_of(capsys, f"{base}@2", "--show", 1)
    found = compare(f"{base}@2")
    prompt, lead = found.extremes(1)[0][0]
    row = found.telling(prompt, lead)
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if found.pairs.prompts[prompt].id in line)
    assert f"{lead:+.3f}" in lines[at] and lines[at].endswith("mean of 3 pairs")
    assert lines[at + 1].endswith(f"{found.by.leads[row]:+.3f}")
    assert found.by.leads[row] == found.by.a[row] - found.by.b[row]  # type: ignore[index]


def test_a_program_can_read_it_whole(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, base, "--json", "--fail-if", "reward.p > 2")
    found = json.loads(out)
    assert (found["pairs"], found["prompts"], found["ranked_by"]) == (24, 8, "reward")
    reward = found["measures"]["reward"]
    assert set(reward["win_rate"]) == {"mean", "low", "high"}
    assert (reward["p_method"], reward["left_out"], reward["kind"]) == ("exact", 0, "recorded")
    assert found["gates"] == [{"fail_if": "reward.p > 2", "value": reward["p"], "passed": True, **words(found)}]
    assert set(found["wins"][0]) >= {"prompt_id", "prompt", "lead", "k", "seed", "a", "b", "scores"}


def words(found: dict[str, Any]) -> dict[str, str]:
    return {"words": f"reward.p is {found['measures']['reward']['p']:.4g}"}


def test_every_pair_is_a_row_that_pandas_reads(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "pairs.parquet"
    output_of(capsys, base, "--out", out)
    rows = pd.read_parquet(out)
    assert len(rows) == 24
    verdicts = np.sign(rows["reward/a"] - rows["reward/b"]).map({1: "win", 0: "tie", -1: "loss"})
    assert (rows["reward/verdict"] == verdicts).all()
    assert (rows["reward/a"] == rows["a"]).all()
    _, err = output_of(capsys, base, "--out", out, code=2)
    assert "--out must not exist yet" in err
    _, err = output_of(capsys, base, "--out", tmp_path / "pairs.csv", code=2)
    assert "--out must end in .parquet; got 'pairs.csv'" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--judge", "http://127.0.0.1:1"], "--judge needs --judge-model"),
        (["--judge-model", "m"], "--judge-model and --judge-prompt need --judge"),
        (["--judge", "here", "--judge-model", "m"], "--judge must be a URL that begins with http:// or https://"),
        (
            ["--judge", "http://h", "--judge-model", "m", "--judge-timeout", "0"],
            "--judge-timeout must be above 0; got 0.0",
        ),
        (["--judge", "http://h", "--judge-model", "m", "--judge-timeout", "nan"], "--judge-timeout must be at most"),
        (["--judge", "http://h", "--judge-model", "m", "--judge-concurrency", "0"], "--judge-concurrency must be at"),
        (["--judge", "http://h", "--judge-model", "m", "--judge-retries", "-1"], "--judge-retries must be at least 0"),
        (["--judge", "http://h", "--judge-model", "m", "--judge-key-env", "NOPE_X"], "'NOPE_X', which is not set"),
        (["--judge", "http://h", "--judge-model", "m", "--judge-parameters", "3"], "must be a JSON object; got '3'"),
        (
            ["--judge", "http://h", "--judge-model", "m", "--judge-prompt", "none.txt"],
            "must name a text file; got 'none",
        ),
        (["--reward", "{3"], "--reward must be JSON"),
        (["--reward", '{"spec": "length", "wait": 3}'], "wait is not a field"),
        (["--tie-within", "-1"], "--tie-within must be at least 0; got -1.0."),
        (["--by", "rewrad"], "--by: there is no measure 'rewrad'; did you mean 'reward'?"),
        (["--show", "-1"], "--show must be at least 0"),
    ],
)
def test_a_flag_that_cannot_be_meant_is_refused_with_2(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["compare", str(base), "--judge-cache", str(tmp_path / "cache"), *flags]) == 2
    assert said in capsys.readouterr().err


# -- a judge -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    """`transformers serve`: four seconds to start on an idle machine."""
    with chat_server(tmp_path_factory.mktemp("server")) as started:
        yield started


def judge_flags(url: str, model: str, cache: Path, *more: object) -> list[object]:
    tokens = ["--judge", url, "--judge-model", model, "--judge-cache", cache, "--judge-timeout", 60]
    return [*tokens, "--judge-parameters", '{"max_tokens": 4}', *more]


@pytest.mark.slow
def test_a_model_that_always_says_a_gives_ties_and_is_detected(
    base: Path, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, out = server.answered, tmp_path / "pairs.parquet"
    tokens = judge_flags(server.url, server.always_a, tmp_path / "cache")
    printed, err = output_of(capsys, base, *tokens, "--out", out, "--fail-if", "judge.inconsistent > 0.5", code=3)
    assert (
        "position bias: 100 % of verdicts changed with the order; 100 % of its choices were the first completion"
        in printed
    )
    assert re.search(r"judge \(always-a\) +– +– +– +0/100/0 % +50 % ", printed)
    assert "judge.inconsistent is 1" in err
    rows = pd.read_parquet(out)
    different = rows[rows["a"] != rows["b"]]
    assert set(different["judge/a_first/reply"]) == set(different["judge/b_first/reply"]) == {"A"}
    assert set(different["judge/a_first/verdict"]) == {"A"}
    assert set(different["judge/b_first/verdict"]) == {"B"}  # the answer that stood first was B's
    assert set(rows["judge/verdict"]) == {"tie"}
    assert rows["judge/identical"].sum() == (rows["a"] == rows["b"]).sum() > 0

    asked_for = len(
        {(p, *sorted((a, b))) for p, a, b in zip(rows["prompt"], rows["a"], rows["b"], strict=True) if a != b}
    )
    assert server.answered - before == 2 * asked_for  # equal pairs of a prompt are asked about once
    printed, err = output_of(capsys, base, *tokens)
    assert server.answered - before == 2 * asked_for
    assert err == ""
    count = 2 * len(different)
    assert f"{count} questions ({count} answered from disk)" in printed


@pytest.mark.slow
def test_a_model_that_knows_nothing_of_judging_is_nonsense(
    base: Path, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("{prompt}: {answer_a} or {answer_b}?")
    tokens = judge_flags(server.url, server.starter, tmp_path / "cache", "--judge-prompt", tmp_path / "prompt.txt")
    _, err = output_of(capsys, base, *tokens, code=1)
    assert re.search(
        r"the judge gave no verdict on 16 of 16 questions \(16 nonsense\); the other \d+ were not asked\.", err
    )
    assert "error:   nonsense: '" in err


@pytest.mark.slow
def test_a_model_that_the_server_does_not_have_is_reported_by_its_status(
    base: Path, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = judge_flags(server.url, "./no-such-model", tmp_path / "cache", "--judge-retries", 1)
    _, err = output_of(capsys, base, *tokens, code=1)
    assert re.search(r"16 of 16 questions \((\d+ broke off, )?\d+ HTTP \d{3}", err)
    assert "--judge-model (./no-such-model)" in err


@pytest.mark.slow
def test_an_abler_judge_ranks_the_prompts(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A judge that reads the answers as numbers agrees with the reward, verdict by verdict."""
    template = tmp_path / "prompt.txt"
    template.write_text("{prompt} {answer_a} {answer_b}")

    def larger(body: dict[str, Any]) -> Any:
        _, first, second = question_of(body).split()
        return chat("[[A]]" if int(first) > int(second) else "[[B]]")

    with serving(larger) as numbers:
        tokens = judge_flags(numbers.url, "m", tmp_path / "cache", "--judge-prompt", template)
        out, _ = output_of(capsys, base, *tokens, "--json", "--by", "judge")
    found = json.loads(out)
    reward, judge = found["measures"]["reward"], found["measures"]["judge"]
    for name in ("wins", "ties", "losses", "win_rate", "pairs"):
        assert judge[name] == reward[name]
    assert (judge["inconsistent"], judge["failures"], judge["difference"]) == (0.0, 0.0, None)
    assert found["ranked_by"] == "judge"


def test_a_judge_that_is_not_there_ends_with_1_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = closed_url(), tmp_path / "pairs.parquet"
    _, err = output_of(capsys, base, *judge_flags(url, "m", tmp_path / "cache", "--out", out), code=1)
    assert "(16 refused)" in err
    assert f"Is a server running at {url}/chat/completions? Check --judge." in err
    assert not out.exists()
