"""A reward in a process of its own."""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.errors import ConfigError, RewardError
from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, load_reward, load_rewards
from raftune.rewards.process.client import ProcessReward
from raftune.rewards.process.protocol import batch_from, batch_table
from raftune.rewards.resolve import resolve

FILE = """
import json, os, re, sys, time

def act(completions, act=("pid",), log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    n = len(completions)
    if act[0] == "leave":
        os._exit(7)
    if act[0] == "hold the lock":
        re.match(r"(a+)+$", "a" * 64 + "b")
    if act[0] == "sleep":
        time.sleep(60)
    if act[0] == "read":
        return [float(sys.stdin.read() == "")] * n
    if act[0] == "log":
        log_metric("step", trainer_state.global_step)
        log_extra("upper", [text.upper() for text in completions])
    if act[0] == "columns":
        seen = {"completions": completions, **{k: v for k, v in kwargs.items() if k != "log"}}
        log_extra("seen", [json.dumps(seen, sort_keys=True)] * n)
    return [float(os.getpid())] * n

def timed(completions, **kwargs):
    import signal
    signal.setitimer(signal.ITIMER_REAL, 10)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosted") / "acts.py"
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def reward_set(file: Path) -> Iterator[Any]:
    with load_rewards(RewardsConfig(reward_funcs=(f"{file}:act",), timeout=2.0)) as reward_set:
        yield reward_set


def batch_of(act: str, size: int = 2, **columns: list[Any]) -> RewardBatch:
    return RewardBatch(
        ["q"] * size, [f"a{i}" for i in range(size)], {"act": [act] * size, **columns}, state={"global_step": 5}
    )


def pid(reward_set: Any) -> int:
    return int(reward_set.score(batch_of("pid"))[0].value)


def test_the_reward_runs_in_another_process_which_stays(reward_set: Any) -> None:
    assert pid(reward_set) == pid(reward_set) != os.getpid()


@pytest.mark.slow
def test_a_process_that_exits_is_an_error_and_another_one_takes_the_next_call(reward_set: Any) -> None:
    before = pid(reward_set)
    part = reward_set.score(batch_of("leave"))[0].parts["act"]
    assert (part.status, part.detail) == (ScoreStatus.ERROR, "the reward's process exited with code 7")
    assert pid(reward_set) != before


@pytest.mark.slow
def test_a_process_that_was_killed_between_calls_is_replaced(reward_set: Any) -> None:
    before = pid(reward_set)
    os.kill(before, signal.SIGKILL)
    time.sleep(0.2)
    assert pid(reward_set) != before


@pytest.mark.slow
def test_a_reward_that_holds_the_interpreters_lock_is_ended_all_the_same(file: Path) -> None:
    with load_rewards(RewardsConfig(reward_funcs=({"spec": f"{file}:act", "timeout": 0.5},))) as reward_set:
        before = pid(reward_set)
        assert reward_set.score(batch_of("hold the lock"))[0].status is ScoreStatus.TIMEOUT
        assert not alive(before)


def test_standard_input_is_empty_for_the_reward(reward_set: Any) -> None:
    assert reward_set.score(batch_of("read"))[0].value == 1.0


def test_logs_and_the_trainers_state_cross_the_border(reward_set: Any) -> None:
    reward_set.score(batch_of("log"))
    assert reward_set.extras.columns == {"upper": ["A0", "A1"]}
    assert reward_set.extras.metrics == {"step": 5.0}


def test_columns_arrive_as_they_were(reward_set: Any) -> None:
    nested = [{"role": "user", "content": "x"}, {"content": "y", "tool": None, "k": [1, {"z": 2.5}]}]
    columns = {
        "nested": nested,
        "mixed": [1, "one"],
        "big": [2**80, None],
        "none": [None, None],
        "odd": ["\ud800", "é\0"],
    }
    reward_set.score(batch_of("columns", **columns))
    seen = json.loads(reward_set.extras.columns["seen"][0])
    assert {name: seen[name] for name in columns} == columns
    assert seen["completions"] == ["a0", "a1"]


def test_batches_survive_the_wire_value_for_value() -> None:
    messages = [[{"role": "user", "content": "q"}], [{"role": "user", "content": [{"type": "text", "text": "q"}]}]]
    columns = {
        "when": [datetime.date(2024, 1, 2), None],
        "flag": [True, None],
        "number": [0.1, float("inf")],
        "bytes": [b"\0\xff", b""],
        "mixed": [1, 2.5],
    }
    before = RewardBatch(messages, messages, columns, [[1, 2], []], {"epoch": 1.5})
    assert batch_from(batch_table(before), before.state) == before


def test_a_column_that_cannot_be_sent_is_an_error_that_names_it(reward_set: Any) -> None:
    part = reward_set.score(batch_of("pid", thing=[object(), object()]))[0].parts["act"]
    assert part.status is ScoreStatus.ERROR
    assert "column/thing holds values (of type object) that cannot be sent" in part.detail


def test_time_limits_by_signal_work_inside_the_reward(file: Path) -> None:
    reward = load_reward(f"{file}:timed")
    assert reward(prompts=["q"], completions=["a"]) == [1.0]
    reward.close()


@pytest.mark.slow
def test_the_process_ends_when_its_input_closes_even_in_the_middle_of_a_call(file: Path) -> None:
    code = (
        "import os, sys; from raftune.rewards import *; from raftune.config.rewards import RewardsConfig\n"
        f"rewards = load_rewards(RewardsConfig(reward_funcs=({str(file)!r} + ':act',)))\n"
        "print(int(rewards.score(RewardBatch(['q'], ['a'], {'act': ['pid']}))[0].value), flush=True)\n"
        "rewards.score(RewardBatch(['q'], ['a'], {'act': ['sleep']}))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.slow
def test_a_patterns_catastrophe_costs_its_call_only() -> None:
    config = RewardsConfig(reward_funcs=({"spec": "regex", "options": {"pattern": "(a+)+$"}},), timeout=0.5)
    with load_rewards(config) as reward_set:
        statuses = [reward_set.score(RewardBatch(["q"], [text]))[0].status for text in ("aaa", "a" * 64 + "b", "aaa")]
    assert statuses == [ScoreStatus.OK, ScoreStatus.TIMEOUT, ScoreStatus.OK]


@pytest.mark.slow
def test_code_that_changes_while_the_run_goes_on_ends_it_when_the_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text(FILE)
    with load_rewards(RewardsConfig(reward_funcs=(f"{path}:act",))) as reward_set:
        reward_set.score(batch_of("leave"))
        path.write_text(FILE + "\n# changed\n")
        with pytest.raises(RewardError, match="its code changed while the run was going"):
            reward_set.score(batch_of("pid"))


@pytest.mark.slow
def test_what_cannot_be_loaded_raises_here_what_it_raised_there(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os\nos._exit(4)\n")
    with pytest.raises(RewardError, match="its process exited with code 4 while loading"):
        load_reward(f"{tmp_path}/broken.py:f")
    with pytest.raises(ConfigError, match="no function 'f' in"):
        (tmp_path / "empty.py").write_text("")
        load_reward(f"{tmp_path}/empty.py:f")


def test_a_reward_of_trl_names_the_extra_where_trl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "trl.rewards", raising=False)
    with pytest.raises(ConfigError, match=r"'think_format_reward' needs TRL. Install it: pip install 'raftune\[trl\]'"):
        resolve(RewardSpec(spec="think_format_reward"))


@pytest.mark.slow
def test_trls_own_rewards_are_called_by_their_names() -> None:
    reward = load_reward("trl.rewards:think_format_reward")
    short = RewardSpec(spec="think_format_reward")
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>a</think>b", "b")]
    assert isinstance(reward, ProcessReward)
    assert reward(prompts=[[]] * 2, completions=completions, completion_ids=[[1], [2]]) == [1.0, 0.0]
    assert (reward.name, short.derived_name, reward.accepts) == ("think_format_reward", "think_format_reward", None)
    reward.close()


def alive(process: int) -> bool:
    """False of a zombie too, which a container without an init process leaves."""
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
