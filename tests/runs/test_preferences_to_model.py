"""From human preferences to an aligned model by commands alone, each as a user would copy it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from tests.hh import write_hh

pytestmark = pytest.mark.slow

ROUNDS = "--num_rounds 1 --prompts_per_round 4 --sampling.num_generations 4 --sampling.max_completion_length 16"
HELD_OUT = "--evaluation.num_prompts 6 --evaluation.num_generations 2 --engine.threads 1"
# What makes each command of the path small; the path itself is the one that `raftune starter` names.
SMALL = {
    "sft": "--training.max_steps 3 --threads 1",
    "reward": "--max_steps 2 --allow_chance --threads 1",
    "train": f"{ROUNDS} {HELD_OUT}",
    "evaluate": f"--sampling.max_completion_length 16 {HELD_OUT}",
    "compare": "",
    "report": "",
}


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; it must succeed."""
    code = main(words)
    said = capsys.readouterr()
    assert code == 0, f"{' '.join(words)}\n{said.err}"
    return said.out


def test_the_commands_that_the_starter_names_lead_to_an_aligned_model_and_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = json.loads(call(["starter", "here", "--rows", "120", "--json"], capsys))["commands"]
    assert [command[1] for command in named] == list(SMALL)
    said = {words[1]: call([*words[1:], *SMALL[words[1]].split()], capsys) for words in named}

    reference = tmp_path / "here/run/round-0000/model/reference.json"
    start = (reference.parent / json.loads(reference.read_text())["name"]).resolve()
    assert start == (tmp_path / "here/sft/model").resolve()  # the run begins where sft ended
    scores = pq.read_table("here/run/round-0001/score/chunk-00000.parquet")
    assert [name for name in scores.column_names if name.startswith("rewards/")] == ["rewards/model"]
    assert {*scores.column("status").to_pylist()} == {"ok"}  # by the reward model that was just trained
    assert "reward (model)" in said["compare"] and "held_out (judge)" in said["compare"]
    assert "12 pairs: 6 prompts, 2 completions each, the same seeds" in said["compare"]
    page = Path("here/run/report.html").read_text(encoding="utf-8")
    assert "here/sft/model" in page and len(page) > 20_000


def test_a_file_of_dialogues_goes_the_same_path_though_it_has_no_prompts_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written = write_hh(tmp_path / "hh.jsonl.gz", share=0.15)
    judge = f"{Path(__file__).parents[1] / 'hh.py'}:judge"
    data = str(written.path)
    learned = call(
        ["sft", data, "--policy.model", "starter", "--output_dir", "sft", *SMALL["sft"].split(), "--json"], capsys
    )
    rewarded = call(
        ["reward", "train", data, "--model", "starter", "--output_dir", "rm", *SMALL["reward"].split(), "--json"],
        capsys,
    )
    skipped = sum(map(len, written.skipped.values()))
    assert sum(json.loads(learned)["data"]["skipped"].values()) == skipped + len(written.long_prompts)
    assert json.loads(rewarded)["data"]["skipped"] == skipped
    run = ["--policy.model", "sft/model", "--data.prompts", "sft/prompts.jsonl", "--rewards.reward_funcs", "rm/model"]
    run += ["--evaluation.prompts", "sft/held_out.jsonl", "--evaluation.reference_column", "reference"]
    run += ["--evaluation.reward_funcs", judge, "--output_dir", "run", *SMALL["train"].split()]
    call(["train", *run], capsys)
    metrics = json.loads(Path("run/round-0001/evaluate/metrics.json").read_text())
    assert {"reward", "held_out", "perplexity"} <= set(metrics)
