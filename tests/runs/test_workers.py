"""Units in worker processes: the same bytes for any number of them, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from raftune.engines.local import InProcessEngine, LocalProcesses, WorkerProcess
from raftune.engines.pool import WorkerPool
from raftune.errors import DataError, EngineError, OutOfMemory
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import resume, run
from raftune.store.run import RunFolder
from tests.runs import tiny
from tests.runs.crashing import ORDERS
from tests.runs.kill import difference, tree

REPOSITORY = Path(__file__).parents[2]
Orders = Callable[..., None]
FAMILY = "tests.runs.crashing:Crashing"


@pytest.fixture(autouse=True)
def workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Tells units to fail, and to leave a mark when they are begun."""

    def give(**chunks: list[int]) -> None:
        monkeypatch.setenv(ORDERS, json.dumps({"marks": str(tmp_path / "marks"), **chunks}))

    return give


def settings(workers: int, **changes: Any) -> dict[str, Any]:
    """One round of four units on a family that can be told to crash; the workers generate, for the reward is an
    object.
    """
    engine = {"workers": workers, **changes.pop("engine", {})}
    base = {
        "num_rounds": 1,
        "sampling": {"chunk_size": 2},
        "evaluation": {"num_prompts": 0},
        "policy": {"family": FAMILY, "options": {"num_prompts": 4, "num_answers": 5}},
    }
    return {**base, "engine": engine, **changes}


def generate_events(root: Path) -> list[int]:
    return [e["chunk"] for e in RunFolder(root).events if e["event"] == "chunk" and e["stage"] == "generate"]


def without_workers(found: dict[str, str]) -> dict[str, str]:
    """The tree without the two files that hold the number of workers itself."""
    return {name: content for name, content in found.items() if not name.startswith("config.")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of it."""
    root = tmp_path_factory.mktemp("alone") / "run"
    run(tiny.config(root, **settings(1)), tiny.objects())
    return without_workers(tree(root))


@pytest.mark.slow
def test_more_workers_write_the_same_bytes(tmp_path: Path, alone: dict[str, str]) -> None:
    """Three; that two do, even when one is killed, is claimed below."""
    run(tiny.config(tmp_path / "run", **settings(3)), tiny.objects())
    assert difference(alone, without_workers(tree(tmp_path / "run"))) == ""


@pytest.mark.slow
def test_a_reward_from_a_file_scores_the_same_in_workers(tmp_path: Path) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text("def worth(prompts, completions, **kwargs):\n    return [c / 2 for c in completions]\n")
    rewards = {"rewards": {"reward_funcs": [f"{reward}:worth"]}}
    given = PythonObjects(train=tiny.train, held_out=tiny.held_out)
    for workers in (1, 2):
        run(tiny.config(tmp_path / f"{workers}", **settings(workers, **rewards)), given)
    trees = [without_workers(tree(tmp_path / f"{workers}")) for workers in (1, 2)]
    assert "round-0001/score/chunk-00003.parquet" in trees[0]
    assert difference(*trees) == ""


def test_chunks_in_any_order_give_the_same_bytes(
    tmp_path: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = InProcessEngine.run
    monkeypatch.setattr(
        InProcessEngine, "run", lambda self, job, stage, chunks: forwards(self, job, stage, chunks[::-1])
    )
    run(tiny.config(tmp_path / "run", **settings(1)), tiny.objects())
    assert generate_events(tmp_path / "run") == [3, 2, 1, 0]
    assert difference(alone, without_workers(tree(tmp_path / "run"))) == ""


@pytest.mark.slow
def test_a_killed_worker_costs_no_more_than_the_chunks_in_flight(
    tmp_path: Path, alone: dict[str, str], orders: Orders
) -> None:
    orders(kill_once=[0, 3])
    run(tiny.config(tmp_path / "run", **settings(2)), tiny.objects())
    assert starts_of_chunks(tmp_path) == {0: 2, 1: 1, 2: 1, 3: 2}
    assert difference(alone, without_workers(tree(tmp_path / "run"))) == ""


@pytest.mark.slow
def test_a_chunk_that_always_kills_its_worker_stops_the_run_after_three_tries(tmp_path: Path, orders: Orders) -> None:
    orders(kill_always=[1])
    with pytest.raises(EngineError, match=r"chunk 1 of generate of round 1 failed 3 times: its worker process"):
        run(tiny.config(tmp_path / "run", **settings(2)), tiny.objects())
    assert starts_of_chunks(tmp_path)[1] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "how"), [(2, "kill_always"), (2, "raise_always"), (1, "raise_always")])
def test_a_chunk_that_always_fails_can_be_set_aside_and_its_prompts_are_named(
    tmp_path: Path, orders: Orders, workers: int, how: str
) -> None:
    orders(**{how: [1]})
    root = tmp_path / "run"
    run(tiny.config(root, **settings(workers, engine={"on_chunk_failure": "skip"})), tiny.objects())
    commit = RunFolder(root).commit(1, "generate")
    assert commit is not None
    assert list(commit.quarantined) == ["chunk-00001.parquet"]
    summary = json.loads((root / "round-0001/select/summary.json").read_text())
    assert list(summary["empty_prompts"].values()) == ["its unit failed and was set aside"] * 2
    assert (summary["prompts"], summary["samples"]) == (8, 24)


def test_when_every_chunk_fails_the_run_stops_whatever_is_configured(tmp_path: Path, orders: Orders) -> None:
    orders(raise_always=[0, 1, 2, 3])
    skip = {"on_chunk_failure": "skip", "max_retries": 0}
    with pytest.raises(EngineError, match="every chunk of generate of round 1 failed; chunk 0: RuntimeError: broken"):
        run(tiny.config(tmp_path / "run", **settings(1, engine=skip)), tiny.objects())


@pytest.mark.slow
def test_a_chunk_that_hangs_is_ended_at_its_time_limit_and_tried_again(
    tmp_path: Path, alone: dict[str, str], orders: Orders
) -> None:
    orders(hang_once=[2])
    run(tiny.config(tmp_path / "run", **settings(2, engine={"chunk_timeout": 10})), tiny.objects())
    assert starts_of_chunks(tmp_path) == {0: 1, 1: 1, 2: 2, 3: 1}
    assert difference(alone, without_workers(tree(tmp_path / "run"))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_keeps_its_class_and_words_and_is_not_tried_again(
    tmp_path: Path, orders: Orders, workers: int
) -> None:
    orders(refuse_always=[2])
    with pytest.raises(DataError, match=r"^chunk 2 cannot be generated$"):
        run(tiny.config(tmp_path / "run", **settings(workers)), tiny.objects())
    assert starts_of_chunks(tmp_path)[2] == 1


@pytest.mark.slow
def test_after_an_error_no_worker_is_left_and_the_run_can_be_resumed(
    tmp_path: Path, alone: dict[str, str], orders: Orders
) -> None:
    root = tmp_path / "run"
    orders(refuse_always=[0], hang_always=[1])
    with pytest.raises(DataError):
        run(tiny.config(root, **settings(2)), tiny.objects())
    assert workers_of(root) == []
    orders()
    resume(root, tiny.objects())
    assert difference(alone, without_workers(tree(root))) == ""


def test_out_of_memory_at_one_row_keeps_its_class(tmp_path: Path) -> None:
    nothing = {"family": FAMILY, "options": {"num_prompts": 4, "num_answers": 5, "memory": 0}}
    with pytest.raises(OutOfMemory, match="rows do not fit") as caught:
        run(tiny.config(tmp_path / "run", **(settings(2) | {"policy": nothing})), tiny.objects())
    assert caught.value.batch_size == 1


def test_a_worker_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.config(root, **settings(1)), tiny.objects())
    config = json.dumps(RunFolder(root).read_config()).replace("tests.runs.crashing", "tests.runs.nowhere")
    RunFolder(root).write_config(json.loads(config))
    worker = WorkerProcess(root, 0, tiny.config(root).engine)
    answer = worker.request({"round": 1, "stage": "generate", "chunk": 0, "key": "any"})
    worker.end()
    assert (answer["kind"], answer["final"]) == ("ConfigError", True)
    assert "tests.runs.nowhere" in answer["error"]


@pytest.mark.slow
def test_workers_end_when_the_loop_is_killed_even_in_the_middle_of_a_chunk(tmp_path: Path, orders: Orders) -> None:
    root = tmp_path / "run"
    orders(hang_always=[0, 1])
    script = f"""
        from raftune.config import RunConfig
        from raftune.runtime.run import run
        from tests.runs import tiny
        run(RunConfig.model_validate_json({tiny.config(root, **settings(2)).model_dump_json()!r}), tiny.objects())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY)
    wait_until(lambda: len(starts_of_chunks(tmp_path)) == 2)
    assert len(workers_of(root)) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: workers_of(root) == [])


@pytest.mark.slow
def test_a_run_that_is_left_in_the_middle_ends_its_workers(tmp_path: Path, orders: Orders) -> None:
    root = tmp_path / "run"
    orders(hang_always=[0])

    def leave(kind: str, facts: dict[str, Any]) -> None:
        if kind == "chunk" and facts["stage"] == "generate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(root, **settings(2)), tiny.objects(), observe=leave)
    assert workers_of(root) == []


def test_a_worker_that_died_at_rest_is_not_retried(tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(tiny.config(root, **settings(1)), tiny.objects())
    config = tiny.config(root, **settings(2)).engine
    engine = WorkerPool(config, root, LocalProcesses(config, root))
    engine.workers[0] = worker = WorkerProcess(root, 0, engine.config)
    engine.ready[0].set_result({})
    engine.rest()
    assert engine.workers == [worker, None]
    os.kill(worker.process.pid, signal.SIGKILL)
    engine.rest()
    assert engine.workers == [None, None]


def starts_of_chunks(folder: Path) -> dict[int, int]:
    """How often each chunk was begun."""
    counts: dict[int, int] = {}
    for path in (folder / "marks").glob("*-*"):
        chunk = int(path.name.split("-")[0])
        counts[chunk] = counts.get(chunk, 0) + 1
    return dict(sorted(counts.items()))


def workers_of(root: Path) -> list[int]:
    """The processes that serve this run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words[1:4] == ["-m", "raftune.runtime.worker", str(root)] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def wait_until(true: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)
