"""What the process of a reward may do to us, and what may be done to it: the scores are right, or there are none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raftune.config.rewards import RewardsConfig, RewardSpec
from raftune.engines.process import HEAD, Channel, InvalidFrame, marked
from raftune.errors import RewardError
from raftune.records import ScoreStatus
from raftune.rewards import RewardBatch, RewardSet, load_reward, load_rewards
from raftune.rewards.process import executors
from tests.unit.rewards.process.test_process_rewards import alive

FILE = r"""
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path

def pipes():
    fds = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in fds if fd > 2 and "pipe" in link(fd)]

def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""

def write_strays():
    for fd in pipes():
        try:
            os.write(fd, b"stray bytes")
        except OSError:
            pass

def daemon():
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    Path(os.environ["DAEMON_FILE"]).write_text(str(os.getpid()))
    time.sleep(60)
    os._exit(0)

def allow(mark):
    '''True the first time alone, in whatever process.'''
    try:
        Path(mark).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

def act(completions, act, mark, **kwargs):
    kind, first = act[0], allow(mark[0])
    if kind.endswith("always"):
        kind, first = kind.removesuffix(" always"), True
    if kind == "strays" and first:
        write_strays()
    if kind == "kill" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "term" and first:
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "interrupt" and first:
        os.kill(os.getpid(), signal.SIGINT)
    if kind == "segfault" and first:
        ctypes.string_at(0)
    if kind == "close" and first:
        os.closerange(3, 200)
    if kind == "full" and first:
        raise OSError(28, "No space left on device")
    if kind == "daemon":
        daemon()
        time.sleep(60)
    if kind == "print":
        print("from Python " * 10)
        ctypes.CDLL(None).puts(b"from C")
        ctypes.CDLL(None).fflush(None)
        os.system("echo from a shell")
        subprocess.run([sys.executable, "-c", "import os; os.write(1, b'from a child')"])
    if kind == "flood":
        for _ in range(20):
            os.write(1, b"x" * 2**20)
    return [float(text) for text in completions]
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("processes") / "acts.py"
    path.write_text(FILE)
    return f"{path}:act"


@pytest.fixture(scope="module")
def reward_set(spec: str) -> Iterator[RewardSet]:
    with load_rewards(RewardsConfig(reward_funcs=(spec,), timeout=20.0)) as reward_set:
        yield reward_set


def batch_of(kind: str, start: int, mark: Path) -> RewardBatch:
    numbers = [str(start + i) for i in range(3)]
    return RewardBatch(["q"] * 3, numbers, {"act": [kind] * 3, "mark": [str(mark)] * 3})


def values(reward_set: RewardSet, kind: str, start: int, mark: Path) -> list[Any]:
    return [score.value for score in reward_set.score(batch_of(kind, start, mark))]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the channel by /proc")
def test_stray_bytes_shift_no_score(reward_set: RewardSet, tmp_path: Path) -> None:
    assert values(reward_set, "strays", 10, tmp_path / "mark") == [10.0, 11.0, 12.0]
    assert values(reward_set, "fine", 20, tmp_path / "mark") == [20.0, 21.0, 22.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "interrupt", "close", "full"])
def test_a_process_that_died_once_is_retried_and_no_score_shows_it(
    reward_set: RewardSet, tmp_path: Path, kind: str
) -> None:
    reward_set.notes()
    assert values(reward_set, kind, 10, tmp_path / "mark") == [10.0, 11.0, 12.0]
    assert len([note for note in reward_set.notes() if note.endswith("the batch is asked again")]) == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the channel by /proc")
def test_what_a_process_does_to_itself_every_time_is_its_error_and_what_is_done_to_it_ends_the_run(
    reward_set: RewardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "MOST_TRIES", 2)  # each start of a process takes a second
    for kind, how in (
        ("strays", "wrote into the channel of its answers, and was ended"),
        ("segfault", "was ended by signal 11 (SIGSEGV)"),
    ):
        part = reward_set.score(batch_of(f"{kind} always", 0, tmp_path / "mark"))[0].parts["act"]
        assert (part.status, part.detail) == (ScoreStatus.ERROR, f"the reward's process {how}")
    for kind, how in (("kill", r"ended by signal 9 \(SIGKILL\), 2 times"), ("full", "No space left")):
        with pytest.raises(RewardError, match=how):
            reward_set.score(batch_of(f"{kind} always", 0, tmp_path / "mark"))
    assert values(reward_set, "fine", 1, tmp_path / "mark") == [1.0, 2.0, 3.0]


def test_what_python_c_and_children_print_reaches_our_standard_error_and_no_reply(
    reward_set: RewardSet, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert values(reward_set, "print", 5, tmp_path / "mark") == [5.0, 6.0, 7.0]
    deadline, printed = time.monotonic() + 5, ""
    while "from a child" not in printed and time.monotonic() < deadline:
        printed += capfd.readouterr().err
        time.sleep(0.02)
    for words in ("from Python", "from C", "from a shell", "from a child"):
        assert words in printed


def test_megabytes_of_output_take_no_call_its_time(reward_set: RewardSet, tmp_path: Path) -> None:
    assert values(reward_set, "flood", 5, tmp_path / "mark") == [5.0, 6.0, 7.0]


@pytest.mark.slow
def test_a_reward_that_leaves_a_daemon_and_hangs_ends_at_its_limit_and_so_does_the_daemon(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAEMON_FILE", str(tmp_path / "daemon"))
    with load_rewards(RewardsConfig(reward_funcs=(spec,), timeout=1.0)) as reward_set:
        mark = reward_set.rewards[reward_set.names[0]]._process.mark
        began = time.monotonic()
        assert reward_set.score(batch_of("daemon", 0, tmp_path / "mark"))[0].status is ScoreStatus.TIMEOUT
        assert time.monotonic() - began < 5
        assert values(reward_set, "fine", 1, tmp_path / "mark") == [1.0, 2.0, 3.0]
    if sys.platform == "linux":
        assert not alive(int((tmp_path / "daemon").read_text()))
        assert marked(mark) == []


@pytest.mark.slow
def test_a_standard_error_that_takes_nothing_costs_no_score(spec: str, tmp_path: Path) -> None:
    """Closed, on a full disk, a pipe whose reader has gone."""
    code = (
        "import sys, json; from pathlib import Path; from raftune.rewards import *\n"
        "from raftune.config.rewards import RewardsConfig\n"
        f"rewards = load_rewards(RewardsConfig(reward_funcs=({spec!r},)))\n"
        f"columns = {{'act': ['print'], 'mark': [{str(tmp_path / 'mark')!r}]}}\n"
        "values = [rewards.score(RewardBatch(['q'], [str(n)], columns))[0].value for n in range(2)]\n"
        "Path(sys.argv[1]).write_text(json.dumps(values))\n"
    )
    (tmp_path / "score.py").write_text(code)
    redirections = ["<&- >&- 2>&-", "2>/dev/full", "2>&1 | true"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    outs = [tmp_path / f"values{number}" for number in range(len(redirections))]
    started = [
        subprocess.Popen(["sh", "-c", f"{sys.executable} {tmp_path / 'score.py'} {out} {redirection}"], env=env)
        for out, redirection in zip(outs, redirections, strict=True)
    ]
    for process, out in zip(started, outs, strict=True):
        process.wait(60)
        assert out.read_text() == "[0.0, 1.0]"


def test_a_frame_is_taken_only_whole_with_its_checksums_and_in_its_turn() -> None:
    def through(change: Any = lambda frame: frame, number: int = 4) -> bytes:
        first, second = os.pipe(), os.pipe()
        writer, reader = Channel(first[0], second[1]), Channel(second[0], first[1], alive=lambda: False)
        writer.send(4, b"payload")
        frame = change(os.read(second[0], 100))
        os.write(second[1], frame)
        try:
            return reader.receive(number)
        finally:
            writer.close()
            reader.close()

    assert through() == b"payload"
    for at in range(HEAD.size + len(b"payload")):
        with pytest.raises(InvalidFrame):
            through(lambda frame, at=at: frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :])
    for broken, error in (
        (lambda f: b"x" + f, InvalidFrame),
        (lambda f: f[:-1], EOFError),
        (lambda f: f[:3], EOFError),
    ):
        with pytest.raises(error):
            through(broken)
    with pytest.raises(InvalidFrame):
        through(number=5)


def test_what_a_reward_does_to_its_own_streams_and_errors_is_no_death(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import os, sys\n"
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError('no text')\n"
        "def act(completions, **kwargs):\n"
        "    sys.stdout = None\n    os.closerange(0, 90)\n"
        "    if 'c' in completions: raise Mute\n    return [1.0] * len(completions)\n"
    )
    with RewardSet([load_reward(RewardSpec(spec=f"{tmp_path / 'odd.py'}:act"))], batch_size=1) as reward_set:
        scores = reward_set.score(RewardBatch(["q"] * 3, ["a", "b", "c"]))
        assert [score.value for score in scores] == [1.0, 1.0, None]
        assert "Mute" in scores[2].parts["act"].detail
        assert reward_set.notes() == ()
