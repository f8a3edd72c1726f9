"""What a reward gives to `log_metric` and `log_extra` is on record, and reaches logs, tables and trackers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raftune.cli import main
from raftune.records import EXTRA, extras_of
from raftune.results.round_metrics import kept
from raftune.rewards import RewardSet
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from raftune.stages.score import logged_metrics
from raftune.store.run import RunFolder
from tests.runs.kill import tree
from tests.runs.test_reward_signals import sentences_config

FILE = """
import numpy as np

def judge(completions, log_metric, log_extra, **columns):
    lengths = [len(text) for text in completions]
    log_metric("longest", max(lengths))
    log_metric("broken", float("nan"))
    log_extra("length", np.array(lengths, np.int64))
    log_extra("words", [text.split() for text in completions])
    if "c" in completions:
        log_extra("has/c", [text == "c" or None for text in completions])
    log_extra("too few", [1])
    return [float(length) for length in lengths]
"""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("logging") / "judge.py"
    path.write_text(FILE)
    return path


def go(root: Path, *specs: str, rewards: Any = ()) -> None:
    prompts = pa.table({"prompt": ["a", "b", "c", "d"]})
    run(
        sentences_config(root, *specs),
        PythonObjects(train=lambda: prompts, held_out=lambda: prompts.slice(0, 2), rewards=rewards),
    )


def chunk_files(root: Path) -> list[list[dict[str, Any]]]:
    return [pq.read_table(path).to_pylist() for path in sorted(root.glob("round-0001/score/chunk-*.parquet"))]


@pytest.mark.slow
def test_metrics_and_columns_are_part_of_the_record_the_same_wherever_the_reward_runs(
    tmp_path: Path, judge: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path / "hosted", f"{judge}:judge")
    root = tmp_path / "hosted"
    generated = {
        row["sample_id"]: row["completion"]
        for path in root.glob("round-0001/generate/chunk-*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    longest = []
    for rows in chunk_files(root):
        texts = [generated[row["sample_id"]] for row in rows]
        for row, text in zip(rows, texts, strict=True):
            logged = extras_of(row)
            assert (logged["length"], logged["words"], logged["too few"]) == (len(text), text.split(), None)
            assert row[f"{EXTRA}length"] == str(len(text))
            assert not logged.get("has/c") or text == "c"
        longest += [max(map(len, texts[start : start + 4])) for start in range(0, len(texts), 4)]
    assert logged_metrics(root / "round-0001" / "score") == {"longest": sum(longest) / len(longest)}

    shown = kept(RunFolder(root), 1, 2)
    assert [row[3]["words"] for row in shown] == [row[1].split() for row in shown]
    assert main(["samples", str(root), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["extra/words"] == line["completion"].split() for line in lines)

    found = importlib.util.spec_from_file_location("judge", judge)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    go(tmp_path / "here", rewards=[module.judge])
    assert chunk_files(tmp_path / "here") == chunk_files(root)

    score, calls = RewardSet.score, []

    def fails_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(RewardSet, "score", fails_once)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", f"{judge}:judge")
    go(tmp_path / "cut", f"{judge}:judge")
    assert tree(tmp_path / "cut") == tree(root)


ODD = """
class Thing: ...

def odd(completions, log_metric, log_extra, **columns):
    inner = []
    inner.append(inner)
    log_metric(3, 1.0)
    log_metric("half \\ud800", 2.0)
    log_extra("words", [{"b", "a", "c", "dd", "ee"}] * len(completions))
    log_extra("thing", [Thing()] * len(completions))
    log_extra("itself", [inner] * len(completions))
    log_extra("pairs", [{(1, 2): 3}] * len(completions))
    log_extra(4, [1] * len(completions))
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_whatever_is_logged_neither_ends_the_run_nor_depends_on_the_process(tmp_path: Path) -> None:
    """Sets order their texts anew in every process, and objects show their addresses."""
    (tmp_path / "odd.py").write_text(ODD)
    space: dict[str, Any] = {}
    exec(ODD, space)
    go(tmp_path / "a", f"{tmp_path / 'odd.py'}:odd")
    go(tmp_path / "b", rewards=[space["odd"]])
    logged = [[extras_of(row) for shard in chunk_files(tmp_path / name) for row in shard] for name in "ab"]
    assert logged[0][0]["words"] == ["a", "b", "c", "dd", "ee"]
    assert logged[0][0]["4"] == 1
    assert " at 0x" not in logged[0][0]["thing"]
    for rows in logged:
        for row in rows:
            row.pop("thing")  # the name of its module is another
    assert logged[0] == logged[1]
