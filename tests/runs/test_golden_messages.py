"""The wording of the errors that users meet most, all in one file: golden_messages.yaml.

Where a message is changed on purpose, write the file anew and read the difference:

    python -m tests.runs.test_golden_messages
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from raftune.cli import main

GOLDEN = Path(__file__).with_name("golden_messages.yaml")
CASES: dict[str, str] = {name: case["command"] for name, case in yaml.safe_load(GOLDEN.read_text()).items()}

PROMPTS = "".join(json.dumps({"prompt": index % 4}) + "\n" for index in range(12))
FILES = {
    "run.yaml": """
        output_dir: runs/new
        num_rounds: 1
        prompts_per_round: 4
        report: false
        data: {prompts: train.jsonl}
        policy: {family: tabular, num_prompts: 4, num_answers: 5}
        sampling: {num_generations: 2, chunk_size: 4}
        rewards: {reward_funcs: ["rewards.py:value"]}
        evaluation: {prompts: train.jsonl, num_prompts: 4, num_generations: 1}
        engine: {threads: 1}
    """,
    "rewards.py": """
        def value(prompts, completions, **columns):
            return [float(text) for text in completions]

        def too_few(prompts, completions, **columns):
            return [0.0]

        def words(prompts, completions, **columns):
            return ["good" for _ in completions]

        def broken(prompts, completions, **columns):
            return [1 / 0 for _ in completions]

        def needs_column(prompts, completions, reference, **columns):
            return [0.0 for _ in completions]
    """,
    "twice.yaml": "seed: 1\nseed: 2\n",
    "tabs.yaml": "sampling:\n\tnum_generations: 2\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": 1}\n{"prompt": 2\n',
    "questions.jsonl": '{"question": "How many?"}\n' * 4,
    "old.yaml": "tuning: {learning_rate: 0.1}\n",
}


def make_project(folder: Path) -> None:
    """Writes configurations, data, rewards and a finished run."""
    for name, text in FILES.items():
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip(" ")) if lines else 0
        (folder / name).write_text("".join(line[indent:] + "\n" for line in lines))
    (folder / "train.jsonl").write_text(PROMPTS)
    (folder / "notes").mkdir()
    with contextlib.chdir(folder):
        assert run("raftune train run.yaml --output-dir runs/done")[0] == 0
        shutil.copytree("runs/done", "runs/damaged")
    with next((folder / "runs/damaged").glob("round-0001/score/*.parquet")).open("r+b") as file:
        file.seek(20)
        file.write(b"\xff\xff")


def run(command: str) -> tuple[int, str]:
    """The exit code of a command, and its errors, or where it has none, what it prints."""
    shutil.rmtree("runs/new", ignore_errors=True)
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        code = main(shlex.split(command)[1:])
    lines = output.getvalue().replace(str(Path.cwd()), "FOLDER").splitlines()
    return code, "\n".join([line for line in lines if line.startswith("error: ")] or lines)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        make_project(folder)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_an_error_that_users_meet_keeps_its_wording(name: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "400")
    golden: dict[str, Any] = yaml.safe_load(GOLDEN.read_text())[name]
    assert run(golden["command"]) == (golden["code"], golden["says"]), (
        "intended? python -m tests.runs.test_golden_messages"
    )


if __name__ == "__main__":
    os.environ["COLUMNS"] = "400"
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        make_project(Path(place))
        golden = {}
        for name, command in CASES.items():
            code, says = run(command)
            golden[name] = {"command": command, "code": code, "says": says}
    GOLDEN.write_text(yaml.safe_dump(golden, sort_keys=False, allow_unicode=True, width=400))
