"""Whole runs through the command line, on the tabular family."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from raftune.cli import main
from raftune.config.load import load_config
from raftune.results.status import status_of
from raftune.runtime.run import verify
from tests.runs.kill import tree

REWARDS = """
import time

def value(prompts, completions, **columns):
    return [float(answer) for answer in completions]

def slow(prompts, completions, **columns):
    time.sleep(0.15)
    return [float(answer) for answer in completions]

def short(prompts, completions, **columns):
    return [1.0]

def best(prompts, completions, **columns):
    return [float(answer == 4) for answer in completions]
"""
CONFIG = {
    "name": "tab",
    "num_rounds": 2,
    "prompts_per_round": 8,
    "data": {"prompts": "train.jsonl"},
    "policy": {"family": "tabular", "num_prompts": 4, "num_answers": 5, "step": 0.5},
    "sampling": {"num_generations": 4, "chunk_size": 4},
    "selection": {"all_equal": "keep"},
    "rewards": {"reward_funcs": ["rewards.py:value"]},
    "evaluation": {
        "prompts": "held_out.jsonl",
        "num_prompts": 4,
        "num_generations": 2,
        "reward_funcs": ["rewards.py:best"],
    },
    "engine": {"threads": 1},
    "report": False,  # the page has tests of its own
}
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("COV")} | {"COLUMNS": "200"}


def lay_out(folder: Path) -> Path:
    """A folder as a user would have it: prompts, rewards, a configuration."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": number % 4}) for number in range(20)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "held_out.jsonl").write_text("\n".join(lines[:4]))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "tab.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a finished run, which no test changes."""
    folder = lay_out(tmp_path_factory.mktemp("whole"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["train", "tab.yaml"]) == 0
    finally:
        os.chdir(before)
    yield folder


@pytest.fixture
def finished(whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(whole)
    capsys.readouterr()
    return whole / "runs/tab"


@pytest.fixture
def copied(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder once more, for tests that change what is in it."""
    folder = shutil.copytree(whole, tmp_path / "copied")
    monkeypatch.chdir(folder)
    return Path(folder)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(lay_out(tmp_path))
    return tmp_path


def output_of(capsys: pytest.CaptureFixture[str], *tokens: str, code: int = 0) -> tuple[str, str]:
    found = main(list(tokens))
    out, err = capsys.readouterr()
    assert found == code, err
    return out, err


# -- train and resume --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_are_on_stdout_and_progress_on_stderr(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = output_of(capsys, "train", "tab.yaml")
    assert out.startswith("Finished: all 2 rounds are done.\n")
    assert "runs/tab/round-000" in out
    assert "none was judged" not in out
    few, warning, *lines = err.splitlines()
    assert few.startswith("4 prompts are held out")
    assert warning.startswith("4 of 4 held-out prompts are also trained on")
    assert [line.split()[0] for line in lines if not line.startswith("round 2: ")] == ["round", "start", "1", "2"]


@pytest.mark.slow
def test_a_finished_run_says_so_and_where_its_result_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(finished)
    out, _ = output_of(capsys, "train", "tab.yaml")
    assert out.startswith("Already finished; nothing to do: all 2 rounds are done.")
    assert re.search(r"model +runs/tab/round-000\d/model", out)
    assert tree(finished) == before


def test_an_unevaluated_run_says_that_its_best_round_is_the_last(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = output_of(capsys, "train", "tab.yaml", "--name", "unjudged", "--evaluation.num_prompts", "0")
    assert "best      round 2 (the last one: none was judged)" in out


@pytest.mark.slow
def test_a_program_can_read_the_outcome(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "train", "tab.yaml", "--json")
    outcome = json.loads(out)
    assert outcome["rounds"] == 2
    assert not outcome["worked"]
    assert (finished.parents[1] / outcome["model"] / "policy.json").is_file()


@pytest.mark.slow
def test_flags_go_over_files_and_later_files_over_earlier_ones(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fresh / "more.yaml").write_text("num_rounds: 1\nseed: 5\n")
    output_of(capsys, "train", "tab.yaml", "more.yaml", "--seed", "7", "--name", "other")
    config = json.loads((fresh / "runs/other/config.resolved.json").read_text())
    assert (config["num_rounds"], config["seed"], config["prompts_per_round"]) == (1, 7, 8)


@pytest.mark.slow
def test_the_configuration_in_the_run_gives_the_same_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "train", "runs/tab/config.yaml")
    assert out.startswith("Already finished")


@pytest.mark.slow
def test_resume_can_ask_for_more_rounds(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = output_of(capsys, "resume", "runs/tab", "--num-rounds", "3")
    assert out.startswith("Finished: all 3 rounds are done.")
    assert "num_rounds: 2 → 3" in err


@pytest.mark.slow
def test_another_configuration_is_refused_with_the_difference(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = output_of(capsys, "train", "tab.yaml", "--selection.rule", "random", code=2)
    assert "rule" in err
    assert "--from" in err
    assert verify(finished) == []


@pytest.mark.slow
def test_from_redoes_a_stage_and_what_follows(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated = tree(copied / "runs/tab/round-0002/generate")
    _, err = output_of(capsys, "resume", "runs/tab", "--from", "2/select", "--selection.rule", "random", code=2)
    assert "select of round 1" in err  # the rule shaped an earlier round as well
    _, err = output_of(capsys, "resume", "runs/tab", "--from", "2/train")
    assert "set aside, to superseded/: " in err
    assert tree(copied / "runs/tab/round-0002/generate") == generated


def test_resume_takes_no_files(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = output_of(capsys, "resume", "runs/tab", "tab.yaml", code=2)
    assert err.startswith("error: resume takes one run; got 'tab.yaml' as well.")


def test_where_no_run_is_resume_points_to_the_list(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = output_of(capsys, "resume", "runs/none", code=1)
    assert "runs/none holds no run" in err
    assert "`raftune runs`" in err


def test_a_run_in_use_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(finished / "LOCK"):
        _, err = output_of(capsys, "train", "tab.yaml", code=1)
        assert status_of(finished).state == "in use"
    assert err.startswith("error: runs/tab is in use by another process.")


@pytest.mark.slow
def test_a_run_of_a_newer_version_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "runs/tab/round-0001/select/_COMMIT.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": 99}))
    for command in (["train", "tab.yaml"], ["resume", "runs/tab"]):
        _, err = output_of(capsys, *command, code=1)
        assert "has layout 99" in err
        assert "Upgrade raftune" in err


@pytest.mark.slow
def test_a_reward_that_breaks_its_contract_stops_the_run_in_words(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = output_of(capsys, "train", "tab.yaml", "--rewards.reward_funcs", "rewards.py:short", code=1)
    last = err.splitlines()[-1]
    assert "returned 1 values" in last
    assert "max_failure_fraction" in last


@pytest.mark.slow
def test_an_interrupted_run_ends_cleanly_and_resumes_to_the_same_bytes(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = ["--rewards.reward_funcs", "rewards.py:slow", "--num-rounds", "3"]
    command = [sys.executable, "-m", "raftune", "train", "tab.yaml", *slow]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    seen = [process.stderr.readline() for _ in range(4)]  # few held-out prompts, the overlap, the titles and the start
    assert seen[-1].split()[0] == "start"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "stopped: what is committed is kept. Resume with: raftune resume runs/tab"
    assert "Traceback" not in err
    assert out == ""
    assert status_of(fresh / "runs/tab").state == "resumable"
    output_of(capsys, "resume", "runs/tab")
    output_of(capsys, "train", "tab.yaml", *slow, "--output-dir", "runs/whole")
    assert tree(fresh / "runs/tab") == tree(fresh / "runs/whole")


def test_a_second_signal_ends_at_once(fresh: Path) -> None:
    (fresh / "stuck.py").write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from raftune.cli.errors import interruptible\n"
        "with interruptible(Path('x')):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print('still here')\n"
    )
    done = subprocess.run([sys.executable, "stuck.py"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (130, "")
    assert "stopped at once" in done.stderr


@pytest.mark.parametrize("module", ["raftune.cli.app", "raftune.cli.output"])
def test_an_interrupt_while_modules_are_imported_ends_in_a_line(module: str, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
class InterruptImport:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, InterruptImport())
from raftune.cli import main
sys.exit(main(["runs", "nothing"]))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert "stopp" in done.stderr and "Traceback" not in done.stderr


# -- looking -----------------------------------------------------------------------------------------------------------


def test_runs_lists_how_far_each_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "runs")
    title, line = out.splitlines()
    assert title.split() == ["run", "family", "rounds", "best", "reward", "alarms", "state", "when"]
    assert line.split()[:3] == ["tab", "tabular", "2/2"]
    assert " finished " in line
    out, _ = output_of(capsys, "runs", "--json")
    [status] = json.loads(out)
    assert status["state"] == "finished"
    assert status["start_reward"] <= status["best_reward"]


def test_a_damaged_run_is_listed_as_such_and_the_others_too(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bad", "worse"):
        shutil.copytree("runs/tab", f"runs/{name}")
    (copied / "runs/bad/round-0001/generate/_COMMIT.json").write_text("{")
    (copied / "runs/worse/config.resolved.json").write_text("[]")
    out, _ = output_of(capsys, "runs")
    states = {line.split()[0]: line for line in out.splitlines()[1:4]}
    assert " finished " in states["tab"]
    assert " damaged " in states["bad"]
    assert " damaged " in states["worse"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best.json", "[1, 2]"),
        ("best.json", "junk{"),
        ("best.json", '{"round": "x"}'),
        ("round-0001/evaluate/metrics.json", "[3]"),
        ("round-0001/evaluate/metrics.json", '{"reward": 5}'),
        ("round-0001/select/summary.json", "null"),
        ("round-0001/guard/alarms.json", '{"x": 1}'),
        ("round-0001/guard/alarms.json", "[5]"),
    ],
)
def test_a_run_whose_numbers_are_none_is_listed_as_damaged_with_the_file_and_the_fix(
    fresh: Path, finished: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    shutil.copytree(finished, fresh / "runs/harmed")
    (fresh / "runs/harmed" / name).write_text(content)
    out, _ = output_of(capsys, "runs", str(fresh / "runs"))
    assert " damaged " in out
    assert f"{name.split('/')[-1]}" in out
    assert "resume" in out


def test_alarms_that_are_none_are_refused_by_the_name_of_their_file(
    fresh: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, fresh / "runs/harmed")
    (fresh / "runs/harmed/round-0001/guard/alarms.json").write_text('{"x": 1}')
    _, err = output_of(capsys, "alarms", str(fresh / "runs/harmed"), code=1)
    assert "alarms.json has 8 bytes" in err and "--from 1/guard`" in err


def test_a_folder_that_is_not_there_is_no_list(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = output_of(capsys, "runs", "nowhere", code=2)
    assert err.startswith("error: there is no folder nowhere.")


@pytest.mark.slow
def test_verify_names_a_changed_file_and_fails(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "verify", "runs/tab")
    assert "is whole" in out
    path = copied / "runs/tab/round-0001/generate/chunk-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    out, _ = output_of(capsys, "verify", "runs/tab", code=1)
    assert "round-0001/generate/chunk-00001.parquet has changed" in out
    out, _ = output_of(capsys, "verify", "runs/tab", "--json", code=1)
    assert len(json.loads(out)["faults"]) == 1
    _, err = output_of(capsys, "train", "tab.yaml", code=1)
    assert "chunk-00001.parquet has changed" in err


def test_samples_mark_what_was_kept_and_why(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "samples", "runs/tab", "--round", "1", "-n", "8")
    assert out.startswith("round 1, 8 of 8 prompts, in order")
    assert out.count("★") == 8
    assert out.count("best of its prompt") == 8
    assert "a better one was kept" in out


def test_samples_are_sorted_as_asked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def groups(sort: str) -> list[list[float]]:
        out, _ = output_of(capsys, "samples", "runs/tab", "--sort", sort, "-n", "8", "--json")
        found: dict[str, list[float]] = {}
        for line in out.splitlines():
            sample = json.loads(line)
            found.setdefault(sample["prompt_id"], []).append(sample["score"])
        return list(found.values())

    best = [max(group) for group in groups("best")]
    worst = [min(group) for group in groups("worst")]
    margin = [max(group) - sum(group) / len(group) for group in groups("margin")]
    assert best == sorted(best, reverse=True)
    assert worst == sorted(worst)
    assert margin == sorted(margin, reverse=True)
    assert len(set(margin)) > 1


def test_the_start_is_shown_by_what_judged_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "samples", "runs/tab", "--round", "0")
    assert "of 4 held-out prompts" in out
    assert "held out " in out
    assert "★" not in out


def test_samples_of_one_prompt_are_found_by_text_or_id(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "samples", "runs/tab", "--prompt", "3", "--json")
    sample = json.loads(out.splitlines()[0])
    again, _ = output_of(capsys, "samples", "runs/tab", "--prompt", sample["prompt_id"], "--json")
    assert json.loads(again.splitlines()[0])["prompt_id"] == sample["prompt_id"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--round", "9"], "--round must be one of 1, 2; got 9"),
        (["--prompt", "zzz"], "no prompt of round 2 has 'zzz'"),
        (["-n", "0"], "--number must be at least 1; got 0"),
        (["--sort", "size"], "--sort"),
    ],
)
def test_samples_that_are_not_there_are_refused(
    tokens: list[str], message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = output_of(capsys, "samples", "runs/tab", *tokens, code=2)
    assert message in err


def test_a_reader_that_leaves_early_is_no_error(finished: Path) -> None:
    command = f"{sys.executable} -m raftune samples runs/tab -n 8 --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_export_writes_what_it_says(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "export", "runs/tab", "--format", "sft", "--out", str(tmp_path / "a.jsonl"))
    assert out == f"Wrote 16 rows to {tmp_path / 'a.jsonl'}.\n"
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 16
    output_of(capsys, "export", "runs/tab", "--format", "model", "--out", str(tmp_path / "model"))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"README.md", "policy.json", "raftune_files.json"}
    _, err = output_of(capsys, "export", "runs/tab", "--format", "model", "--out", str(tmp_path / "model"), code=2)
    assert "must not exist yet, or be empty" in err
    _, err = output_of(
        capsys, "export", "runs/tab", "--format", "sft-tokens", "--out", str(tmp_path / "t.jsonl"), code=2
    )
    assert "needs a family with tokens; got tabular" in err


# -- before a run ------------------------------------------------------------------------------------------------------


def test_init_writes_a_configuration_that_is_valid_and_is_never_overwritten(
    fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = output_of(capsys, "init", "my run.yaml")
    assert "raftune plan" in out
    config = load_config(["my run.yaml"])
    assert config.name == "my-run"
    _, err = output_of(capsys, "init", "my run.yaml", code=2)
    assert "exists already, and is not overwritten" in err


def test_the_schema_describes_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "schema")
    schema = json.loads(out)
    assert {"sampling", "selection", "training", "evaluation"} <= set(schema["properties"])
    assert schema["$defs"]["SamplingConfig"]["properties"]["num_generations"]["description"]


@pytest.mark.slow
def test_plan_counts_what_the_run_then_does(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "plan", "tab.yaml", "--name", "new", "--json")
    plan = json.loads(out)
    generated = sum(
        json.loads(line)["rows"]
        for line in (finished / "events.jsonl").read_text().splitlines()
        if json.loads(line)["event"] == "chunk" and json.loads(line)["stage"] in ("generate", "evaluation generate")
    )
    assert plan["samples"] == generated
    assert plan["amounts"]["kept"] == 8
    assert sum(plan["seconds"].values()) > 0
    assert plan["command"] == "raftune train tab.yaml --name new"
    assert not (finished.parent / "new").exists()


@pytest.mark.slow
def test_plan_says_how_far_a_run_is_and_how_to_start_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = output_of(capsys, "plan", "tab.yaml", "--no-probe")
    assert "2 of 2 rounds are done" in out
    assert out.rstrip().endswith("Start it with:  raftune train tab.yaml")
    assert "repeat an earlier one" in out
    assert err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["--data.prompts", "missing.jsonl"], 2, "must name a file that exists; got 'missing.jsonl'"),
        (["--data.prompt_column", "question"], 2, "must have the column 'question'"),
        (["--rewards.reward_funcs", "rewards.py:polite"], 2, "no function 'polite'"),
        (["--rewards.reward_funcs", "rewards.py:short"], 1, "32 of 32 tried samples could not be scored"),
        (["--sampling.candidate_columns", "human"], 2, "names 'human', which the prompts lack"),
        (["--sampling.top_p", "0.5"], 2, "sampling.top_p means nothing to the tabular family"),
        (["--evaluation.best_by", "polite"], 2, "best_by must be one of reward, held_out, value, best"),
        (["--output-dir", "tab.yaml"], 1, "tab.yaml is a file"),
        (["--seed", "9"], 2, "seed: 0 → 9"),
    ],
)
def test_plan_refuses_what_train_would(
    tokens: list[str], code: int, message: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = [] if tokens[0] == "--seed" else ["--name", "new"]  # a run that is there is held to its configuration
    _, err = output_of(capsys, "plan", "tab.yaml", *name, *tokens, code=code)
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not valid YAML"),
        ("- a", "must hold sections"),
        ("num_round: 1\n", "num_round is not a field; did you mean 'num_rounds'?"),
        ("name: a/b\n", "name must match"),
        ("report_to: wandb\n", "report_to must be a list; got 'wandb'. Write [wandb]."),
        ("sampling: {num_generations: 0}\n", "sampling.num_generations must be greater than or equal to 1; got 0"),
        ("selection: {rule: top_fraction, keep_fraction: 30}\n", "write 0.3"),
    ],
)
def test_a_bad_file_is_refused_with_field_rule_and_fix(
    text: str, message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    _, err = output_of(capsys, "train", "tab.yaml", str(tmp_path / "bad.yaml"), code=2)
    assert message in err
    assert len(err.splitlines()) == 1


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_a_reward_is_checked_on_samples_of_ones_own(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "p", "completion": "x" * n, "target": n} for n in range(1, 6)]
    (fresh / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (fresh / "near.py").write_text(
        "def near(prompts, completions, target, **_):\n"
        "    return [-abs(len(c) - t) / 1.0 + t for c, t in zip(completions, target)]\n"
    )
    out, _ = output_of(capsys, "reward", "check", "near.py:near", "--samples", "s.jsonl", "--json")
    report = json.loads(out)
    assert (report["ok"], report["samples"], report["lowest"], report["highest"]) == (True, 5, 1.0, 5.0)


def test_a_reward_that_breaks_its_contract_fails_the_check(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = output_of(capsys, "reward", "check", "rewards.py:short", code=3)
    assert "not fit for a run yet" in out
    assert "returns 1 values for 16 completions" in out


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["lenth"], "did you mean 'length'?"),
        (["length", "--options", "3"], "--options must be a JSON object"),
        (["length", "--options", "{oops"], "--options must be JSON"),
        (["length", "--samples", "train.jsonl"], "must have the columns prompt and completion; completion is missing"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused(
    tokens: list[str], message: str, fresh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = output_of(capsys, "reward", "check", *tokens, code=2)
    assert message in err
