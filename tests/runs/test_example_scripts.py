"""Every script of examples/ runs, in small, and shows what it says."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from raftune.config.load import validate
from raftune.store.parquet import read_table
from raftune.testing import begin, claims

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "digits" not in path.parts]
PROMPTS = "--prompts_per_round 4 --num_generations 4"
TRAINER = "--max_completion_length 16 --num_train_epochs 1 --use_cpu True --disable_tqdm True"
ONE_ROUND = f"--num_rounds 1 {PROMPTS} {TRAINER} --num_eval_prompts 4 --num_generations_eval 2"
ONE_ROUND += ' --run_config {"engine.threads":1}'

Call = Callable[..., str]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a script with these flags in an empty folder, and returns what it prints."""

    def run(script: str, flags: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *flags.split()])
        monkeypatch.setattr(sys, "path", [*sys.path])  # user code may extend it
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def functions_of(script: str) -> dict[str, Any]:
    """What the script defines, without running it."""
    return runpy.run_path(str(EXAMPLES / script), run_name="example")


def number(pattern: str, printed: str) -> float:
    """The number that a line ends with. AssertionError where no line begins so."""
    match = re.search(rf"{pattern}\D*?(-?\d+\.\d+)", printed)
    assert match is not None, printed
    return float(match[1])


def column(pattern: str, name: str) -> list[Any]:
    """A column of all files of the run that match, in the order of their names."""
    return [value for path in sorted(Path().glob(pattern)) for value in read_table(path).column(name).to_pylist()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_a_script_is_short_and_says_how_to_run_it(script: Path) -> None:
    name, source = script.relative_to(EXAMPLES).as_posix(), script.read_text(encoding="utf-8")
    assert 20 <= len(source.splitlines()) <= 60
    runs = '\nif __name__ == "__main__":\n' in source
    words = ast.get_docstring(ast.parse(source)) or ""
    assert (f"python examples/{name}" in words) == runs
    assert f"]({name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_a_grpo_script_runs_under_two_other_names(call: Call) -> None:
    printed = call("grpo.py", f"{ONE_ROUND} --num_prompts 8 --output_dir out")
    number("reward on held-out prompts", printed)
    AutoTokenizer.from_pretrained("out")
    assert AutoModelForCausalLM.from_pretrained("out").num_parameters() > 0
    source = (EXAMPLES / "grpo.py").read_text(encoding="utf-8")
    assert re.findall(r"from raftune import (.*?)  #", source) == ["RaftConfig, RaftTrainer"]


def test_programs_are_run_against_unit_tests_within_limits(call: Call) -> None:
    passes = functions_of("unit_tests_reward.py")["passes"]
    test = "assert f(2) == 4"
    assert passes("def f(x):\n    print('text')\n    return 2 * x", test)
    assert not passes("def f(x):\n    return 0", test)
    assert not passes("def f(x:", test)
    assert not passes("raise SystemExit(0)", test)
    assert not passes("def f(x):\n    while True: pass", test)  # CPU time
    if sys.platform == "linux":
        assert not passes("def f(x):\n    text = 'x' * 2**30\n    return 4", test)

    flags = "--num_rounds 1 --max_completion_length 8 --num_train_epochs 1 --use_cpu True --disable_tqdm True"
    number("programs that pass", call("unit_tests_reward.py", f"{flags} --output_dir out"))
    verdicts = read_table(Path("out/round-0001/select/verdicts.parquet")).to_pylist()
    kept = [row for row in verdicts if row["weight"] > 0]
    assert [row["score"] for row in kept] == [1.0, 1.0]
    assert {row["score"] for row in verdicts} == {0.0, 1.0}
    assert {row["source"] for row in kept} == {"column:solution"}


def test_preferences_lead_to_a_reward_model_and_to_an_aligned_model(call: Call) -> None:
    printed = call("preferences.py", f"--num_preferences 400 {ONE_ROUND} --output_dir here/run")
    assert number("accuracy on held-out preferences", printed) > 0.5
    number("reward on held-out prompts", printed)
    assert {"rewards/model"} <= {*read_table(next(Path("here/run/round-0001/score").glob("*.parquet"))).column_names}
    AutoModelForCausalLM.from_pretrained("here/model")


def test_a_function_scores_images_beside_a_clip_score(call: Call) -> None:
    flags = "--rounds 1 --prompts_per_round 2 --num_generations 2 --steps 2 --train_steps 1"
    printed = call("image_reward.py", f"{flags} --output_dir out")
    assert "best round: " in printed
    assert Path("out/report.html").is_file()
    dark = column("out/round-0001/score/*.parquet", "rewards/darkness")
    assert len({*dark}) == 4 and all(0 < value < 1 for value in dark)
    assert None not in column("out/round-0001/score/*.parquet", "rewards/clip_score")


def test_a_family_of_ones_own_learns(call: Call) -> None:
    printed = call("family/train.py", "--output_dir out --rounds 2")
    assert number("reward", printed) > 0.3  # the start has -0.36


FAMILY = {
    "name": "letters",
    "policy": {"family": f"{EXAMPLES / 'family' / 'family.py'}:Bigrams"},
    "data": {"prompts": "-"},
    "rewards": {"reward_funcs": ["length"]},
}


def test_the_family_keeps_every_promise_of_a_family(tmp_path: Path) -> None:
    case = begin(validate(FAMILY), tmp_path / "start", prompts=["b", "d"], answer="banana")
    for claim in claims(case.family):
        (tmp_path / claim.__name__).mkdir()
        claim(case, tmp_path / claim.__name__)


def test_a_rule_of_ones_own_decides_and_says_why(call: Call) -> None:
    flags = "--rounds 1 --prompts_per_round 4 --max_completion_length 16 --num_eval_prompts 2 --share 0.5"
    number("reward on held-out prompts", call("rule.py", f"{flags} --output_dir out"))
    verdicts = read_table(Path("out/round-0001/select/verdicts.parquet")).to_pylist()
    kept = [row for row in verdicts if row["weight"] > 0]
    assert [row["rank"] for row in kept] == [1, 1]  # the best of two of four prompts
    assert {row["reason"] for row in kept} == {"best of a prompt with a large gain"}
    assert {row["reason"] for row in verdicts} >= {"a better one was kept", "its prompt gains little"}


def test_only_what_depends_on_a_new_rule_is_done_again(call: Call) -> None:
    printed = call("resume_and_reselect.py", "--prompts_per_round 4 --max_completion_length 16 --output_dir out")
    resumed, again = (re.search(rf"{words}: +(.*)", printed)[1].split() for words in ("resumed", "done again"))
    assert resumed[0] == "2/score"
    assert again[0] == "1/select"
    assert not {"1/score", *(stage for stage in again if stage.startswith("0/"))} & {*again}
    assert {stage for stage in resumed if stage.startswith("2/")} <= {*again}  # from another model: all of round 2
    before, now, both = map(int, re.search(r"kept: +(\d+) samples before, (\d+) now, (\d+) in both", printed).groups())
    assert before == both == 8 and now == 16
    assert sum(weight > 0 for weight in column("out/round-0001/select/verdicts.parquet", "weight")) == 8
    assert any(Path("out/superseded").iterdir())
