"""`raftune reward train` and `raftune reward score`, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from tests.builders import save_backbone
from tests.unit.reward_models.feedback_files import longer_wins, marked, rated, tossed, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    files = {"marked": marked(), "tossed": tossed(), "rated": rated(), "longer": longer_wins()}
    for name, rows in files.items():
        write(folder / f"{name}.jsonl", rows)
    save_backbone(folder / "gpt2", "gpt2")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    """A reward model that prefers a plus to a minus."""
    command = ["reward", "train", str(place / "marked.jsonl"), "--model", str(place / "gpt2")]
    fast = ["--device", "cpu", "--num-train-epochs", "3", "--learning-rate", "3e-3", "--held-out-fraction", "0.25"]
    assert main([*command, "--output-dir", str(place / "rm"), *fast]) == 0
    return place / "rm" / "model"


def trained(place: Path, out: Path, data: str, *flags: str) -> list[str]:
    command = [
        "reward",
        "train",
        str(place / f"{data}.jsonl"),
        "--model",
        str(place / "gpt2"),
        "--output-dir",
        str(out),
    ]
    return [*command, "--device", "cpu", "--threads", "1", "--held-out-fraction", "0.25", *flags]


@pytest.mark.slow
def test_training_says_what_the_model_is_worth(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(trained(place, tmp_path, "marked", "--max-steps", "3", "--allow-chance")) == 0
    said = capsys.readouterr()
    for words in (
        "240 pairs, explicit preferences",
        "accuracy",
        "calibrated",
        "prefers the longer completion in",
        "verdict",
    ):
        assert words in said.out
    assert f"raftune train RUN.yaml --rewards.reward_funcs {tmp_path / 'model'}" in said.out
    assert "training on 180 rows, pairwise" in said.err and "training on" not in said.out
    assert main(trained(place, tmp_path, "marked", "--max-steps", "3", "--allow-chance")) == 0
    assert "Already finished; nothing to do." in capsys.readouterr().out


def test_ratings_are_reported_in_their_own_words(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(trained(place, tmp_path, "rated", "--max-steps", "3", "--allow-chance"))
    said = capsys.readouterr().out
    for words in ("R²", "the mean rating alone has", "Pearson", "a score of 0 is a rating of"):
        assert words in said


def test_a_model_no_better_than_chance_is_a_failed_gate_that_says_what_to_do(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(trained(place, tmp_path, "tossed", "--max-steps", "2", "--json")) == 3
    said = capsys.readouterr()
    assert json.loads(said.out)["published"] is False
    assert "is not better than chance" in said.err and "--allow-chance" in said.err and "held_out.parquet" in said.err
    assert (tmp_path / "report.json").is_file() and not (tmp_path / "model").exists()
    assert main(trained(place, tmp_path, "tossed", "--max-steps", "2", "--allow-chance", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["worked"] is False and (tmp_path / "model").is_dir()


@pytest.mark.slow
def test_a_ruler_is_called_one(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(trained(place, tmp_path, "longer", "--num-train-epochs", "4", "--learning-rate", "3e-3")) == 0
    assert "It may be measuring length alone" in capsys.readouterr().out


def test_fields_come_from_files_too_and_flags_go_over_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rm.yaml").write_text(
        f"data: {place / 'marked.jsonl'}\nmodel: {place / 'gpt2'}\nmax_steps: 1\nallow_chance: true\ndevice: cpu\n"
    )
    command = ["reward", "train", str(tmp_path / "rm.yaml"), "--output-dir", str(tmp_path / "rm"), "--max-steps", "2"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "reward train needs data, a model and a directory"),
        (["a.jsonl", "b.jsonl"], 2, "reward train takes one data set; got a.jsonl, b.jsonl"),
        (["a.jsonl"], 2, "output_dir must be given; it has no default"),
        (["a.jsonl", "--learning-rat", "1"], 2, "did you mean --learning_rate?"),
        (["none.jsonl", "--model", "starter", "--output-dir", "OUT"], 2, "data must name a file that exists"),
        (["none.jsonl", "--model", "./none", "--output-dir", "OUT"], 1, "model must be a folder or a hub name"),
    ],
)
def test_slips_are_refused_with_the_fix(
    words: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main(["reward", "train", *words]) == code
    assert said in capsys.readouterr().err


def test_help_lists_the_fields_of_a_reward_model_without_importing_torch() -> None:
    script = (
        "import sys; from raftune.cli import main; main(['reward', 'train', '--help']); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--center_rewards_coefficient" in said and "--rewards.reward_funcs" not in said
    assert said.splitlines()[-1] == "False"


def test_the_starter_is_a_backbone(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = trained(place, tmp_path, "marked", "--max-steps", "1", "--allow-chance", "--json", "--max-length", "64")
    words[words.index("--model") + 1] = "starter"
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["model"].endswith("policy")


def test_preferences_are_scored_on_both_sides(
    model: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scored.parquet"
    command = ["reward", "score", str(model), str(place / "marked.jsonl"), "--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    assert "the preferred completion scores higher, 240 pairs" in capsys.readouterr().out
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 240 and rows[3]["row"] == 4 and "+" in rows[3]["chosen"]
    assert all(row["margin"] == row["score_chosen"] - row["score_rejected"] for row in rows)
    assert sum(row["margin"] > 0 for row in rows) > 200
    assert main(command) == 2
    assert "--out must not exist yet" in capsys.readouterr().err


def test_completions_are_scored_by_any_reward_and_keep_their_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Q{i}", "completion": "word " * i, "score": i, "kind": "x"} for i in range(6)]
    data, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    with data.open("a") as file:
        file.write('{broken\n{"prompt": "Q", "completion": 3}\n')
    options = json.dumps({"target": 2, "unit": "words"})
    command = ["reward", "score", "length", str(data), "--options", options, "--out", str(out), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == 6 and found["skipped"] == 2 and found["statuses"] == {"ok": 6}
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["given_score"] for row in written] == [row["score"] for row in rows]
    assert written[0]["completion"] == "" and written[0]["kind"] == "x" and written[2]["row"] == 3
    assert max(written, key=lambda row: row["score"])["prompt"] == "Q2"


@pytest.mark.slow
def test_completions_that_cannot_be_scored_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "return [float('nan') if 'bad' in text else 1.0 for text in completions]"
    (tmp_path / "rewards.py").write_text(f"def picky(completions, **columns):\n    {body}\n")
    rows = [{"prompt": f"Q{i}", "completion": "bad" if i == 4 else "fine"} for i in range(6)]
    data, spec = write(tmp_path / "a.jsonl", rows), f"{tmp_path / 'rewards.py'}:picky"
    assert main(["reward", "score", spec, str(data)]) == 0
    said = capsys.readouterr().out
    assert "1 invalid, 5 ok" in said and "prompt 'Q4', completion 'bad'" in said
    all_bad = write(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "bad"}])
    assert main(["reward", "score", spec, str(all_bad)]) == 1
    assert "1 of 1 completion could not be scored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.txt"], "--out must end in .jsonl or .parquet; got 'x.txt'"),
        (["--options", "{"], "--options must be JSON"),
        (["--timeout", "-1"], "timeout must be greater than 0"),
    ],
)
def test_scoring_refuses_what_cannot_be_meant(
    words: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reward", "score", "length", str(place / "marked.jsonl"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_file_without_completions_is_refused_with_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "a"}])
    assert main(["reward", "score", "length", str(data)]) == 2
    assert "FILE must hold at least one usable row" in capsys.readouterr().err
