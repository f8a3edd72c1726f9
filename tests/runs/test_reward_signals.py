"""A signal while a reward scores: nothing of that call is kept, and the resumed run ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raftune.cli.errors import interruptible
from raftune.config import RunConfig, validate
from raftune.config.rewards import RewardSpec
from raftune.errors import Interrupted
from raftune.rewards import RewardBatch, RewardSet, load_reward
from raftune.rewards.builtin.aesthetic import save_head
from raftune.rewards.check import example_images
from raftune.runtime.assembly import PythonObjects
from raftune.runtime.run import run
from tests.builders import tiny_clip
from tests.runs.kill import tree
from tests.unit.rewards.builtin.test_classifier_reward import llama, saved, tokenizer

pytestmark = pytest.mark.slow

SENTENCES = ["a b", "c", "d e f g", "a c", "b b b"]
SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Interruption:
    """Sends this process a signal at the nth time that it is called, and waits until it must have come."""

    def __init__(self) -> None:
        self.number, self.left = signal.SIGINT, 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
            time.sleep(0.05)


@pytest.fixture
def interrupt() -> Interruption:
    return Interruption()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), llama(), tokenizer())


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, list[Callable[[], None]]]]:
    """The address of a judge, and what it does before it answers."""
    before: list[Callable[[], None]] = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            for act in before:
                act()
            answer = json.dumps({"scores": [float(len(text)) for text in asked["completions"]]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", before
    server.shutdown()
    server.server_close()


def sentences_config(root: Path, *rewards: Any) -> RunConfig:
    return validate(
        {
            "output_dir": str(root),
            "num_rounds": 1,
            "prompts_per_round": 4,
            "report": False,
            "data": {"prompts": "given as an object"},
            "policy": {"family": "tests.runs.injection_family:InjectionFamily", "options": {"sentences": SENTENCES}},
            "sampling": {"num_generations": 4, "chunk_size": 2},
            "evaluation": {"num_prompts": 2, "num_generations": 2},
            "rewards": {"reward_funcs": rewards, "batch_size": 4},
            "engine": {"threads": 1},
        }
    )


def go(config: RunConfig, *rewards: Any) -> None:
    prompts = pa.table({"prompt": ["a", "b", "c", "d"]})
    objects = PythonObjects(train=lambda: prompts, held_out=lambda: prompts.slice(0, 2), rewards=rewards)
    with interruptible(Path(config.output_dir or "")) as watch:
        run(config, objects, observe=watch)


def interrupted_and_resumed(root: Path, interrupt: Interruption, number: int, specs: Any, objects: Any = ()) -> None:
    """One run without an interrupt, one with; what is committed at the interrupt and at the end is the first's."""
    go(sentences_config(root / "whole", *specs), *objects)
    expected = tree(root / "whole")
    interrupt.number, interrupt.left = number, 4
    with pytest.raises(Interrupted, match="raftune resume"):
        go(sentences_config(root / "cut", *specs), *objects)
    assert interrupt.left <= 0
    kept = {name: sha for name, sha in tree(root / "cut").items() if "/score/unit" in name}
    assert kept.items() <= expected.items()
    go(sentences_config(root / "cut", *specs), *objects)
    assert tree(root / "cut") == expected


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_reward_model_scores_leaves_no_trace(
    tmp_path: Path, interrupt: Interruption, reward_model: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(llama()).forward

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        interrupt()
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(llama()), "forward", interrupted)
    interrupted_and_resumed(tmp_path, interrupt, number, [reward_model])


def test_ctrl_c_from_python_comes_out_of_the_run_as_keyboard_interrupt(
    tmp_path: Path, interrupt: Interruption, reward_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As RaftTrainer.train() runs it, without a handler of our own."""
    forward = type(llama()).forward
    monkeypatch.setattr(type(llama()), "forward", lambda *args, **kwargs: (interrupt(), forward(*args, **kwargs))[1])
    interrupt.left = 4
    prompts = pa.table({"prompt": ["a", "b", "c", "d"]})
    with pytest.raises(KeyboardInterrupt):
        run(
            sentences_config(tmp_path, reward_model),
            PythonObjects(train=lambda: prompts, held_out=lambda: prompts.slice(0, 2)),
        )


def test_a_model_that_swallows_the_signal_or_makes_another_error_of_it_commits_nothing_either(
    tmp_path: Path, interrupt: Interruption, reward_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = type(llama()).forward

    def swallows(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = forward(self, *args, **kwargs)
        try:
            interrupt()
        except KeyboardInterrupt:
            given.logits.zero_()
        return given

    def replaces(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            interrupt()
        except BaseException:
            raise RuntimeError("interrupted kernel") from None
        return forward(self, *args, **kwargs)

    for name, act in (("swallows", swallows), ("replaces", replaces)):
        monkeypatch.setattr(type(llama()), "forward", act)
        interrupted_and_resumed(tmp_path / name, interrupt, signal.SIGINT, [reward_model])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_callable_of_this_process_scores_leaves_no_trace(
    tmp_path: Path, interrupt: Interruption, number: int
) -> None:
    def length(completions: list[str], **columns: Any) -> list[float]:
        interrupt()
        return [float(len(text)) for text in completions]

    async def later(completions: list[str], **columns: Any) -> list[float]:
        interrupt()
        return [float(len(text)) for text in completions]

    interrupted_and_resumed(tmp_path / "sync", interrupt, number, [], [length])
    interrupted_and_resumed(tmp_path / "async", interrupt, number, [], [later])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_server_scores_leaves_no_trace(
    tmp_path: Path, interrupt: Interruption, served: tuple[str, list[Any]], number: int
) -> None:
    url, before = served
    before[:] = [interrupt]
    interrupted_and_resumed(tmp_path, interrupt, number, [{"spec": "http", "options": {"url": url}}])


def test_a_signal_while_a_reward_of_its_own_process_scores_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "mark").write_text("off")
    (tmp_path / "lengths.py").write_text(
        "import os, signal, time\nfrom pathlib import Path\nmark = Path(__file__).with_name('mark')\n"
        "def length(completions, **columns):\n"
        "    if mark.read_text() == 'on':\n"
        "        mark.write_text('off')\n"
        "        os.kill(os.getppid(), signal.SIGTERM)\n"
        "        time.sleep(5)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    spec = f"{tmp_path / 'lengths.py'}:length"
    go(sentences_config(tmp_path / "whole", spec))
    (tmp_path / "mark").write_text("on")
    with pytest.raises(Interrupted):
        go(sentences_config(tmp_path / "cut", spec))
    go(sentences_config(tmp_path / "cut", spec))
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_signal_goes_through_every_reward_model_and_an_exit_on_a_thread_stays_the_rewards_own(
    tmp_path: Path, interrupt: Interruption, reward_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = str(tiny_clip(tmp_path / "clip"))
    save_head(tmp_path / "head", [(np.ones((1, 12)), np.zeros(1))], clip=clip)
    for spec, batch in (
        (reward_model, RewardBatch(["a"] * 2, ["b"] * 2)),
        ({"spec": "clip_score", "options": {"model": clip}}, example_images()),
        ({"spec": "aesthetic", "options": {"model": str(tmp_path / "head")}}, example_images()),
    ):
        reward = load_reward(RewardSpec.model_validate(spec))
        model = getattr(reward, "clip_model", reward)
        monkeypatch.setattr(model, "_forward" if model is reward else "image_features", interrupt)
        interrupt.left = 1
        with RewardSet([reward]) as rewards, pytest.raises(KeyboardInterrupt):
            rewards.score(batch)

    def leaves(completions: list[str], **columns: Any) -> list[float]:
        raise SystemExit(3)

    with RewardSet([load_reward(leaves)]) as rewards:
        assert (
            rewards.score(RewardBatch(["a"], ["b"]))[0]
            .parts["leaves"]
            .detail.startswith("SystemExit: 3 (test_reward_signals.py, line ")
        )


class Preempted(RuntimeError):
    """What a script's own handler raises."""


@pytest.mark.parametrize("kind", [TimeoutError, Preempted])
@pytest.mark.parametrize("place", ["model", "callable"])
def test_what_a_scripts_own_handler_raises_leaves_the_run_and_is_no_score(
    tmp_path: Path, reward_model: str, kind: type[Exception], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline by SIGALRM, a batch system's warning: it was swallowed as a time-out, as an error, or by a retry."""
    calls = iter(range(100))

    def interrupt() -> None:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)

    def length(completions: list[str], **columns: Any) -> list[float]:
        interrupt()
        return [float(len(text)) for text in completions]

    def stop(number: int, frame: Any) -> None:
        raise kind("told to end")

    forward = type(llama()).forward
    monkeypatch.setattr(type(llama()), "forward", lambda *args, **kwargs: (interrupt(), forward(*args, **kwargs))[1])
    config = sentences_config(tmp_path, *([reward_model] if place == "model" else []))
    prompts = pa.table({"prompt": ["a", "b", "c", "d"]})
    rewards = [length] if place == "callable" else []
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(kind, match="told to end"):
            run(config, PythonObjects(train=lambda: prompts, held_out=lambda: prompts.slice(0, 2), rewards=rewards))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert next(calls) == 4
