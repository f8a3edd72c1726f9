"""Random interruptions, several in a row: whatever they are, the next call goes on, and the end has the same bytes.

    python -m tests.runs.schedules [--trials 100] [--seed 0] [--only SCENARIO] [--broken WAY]      prints a table

Beside kill.py, which kills at every file event of the tabular family, this one draws: a scenario, one to four
interruptions, each SIGKILL, SIGTERM or SIGINT, at a moment of time, at a file event, or inside a reward. Everything of
a trial follows from its seed, but for the moment of time, which the machine's load shifts.

The process imports torch and runs none of its operations; each life of a trial is a fork of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from raftune.cli.errors import interruptible
from raftune.config.load import validate_as
from raftune.config.sft import SftConfig
from raftune.errors import Interrupted
from raftune.rewards import outcome
from raftune.rewards.process import executors
from raftune.runtime import run
from raftune.runtime.assembly import PythonObjects
from raftune.sft import sft
from raftune.store import files, interruption, job, partial
from raftune.store import run as run_folder
from raftune.training import fit
from raftune.training.quiet import quiet
from tests.builders import save_backbone, save_tiny
from tests.runs import kill, tiny
from tests.unit.reward_models.feedback_files import config_for, marked, train, write

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOST_LIVES = 4  # interruptions of one trial
HANGS = 120.0  # seconds after which a life counts as hanging
Observe = Callable[[str, dict[str, Any]], None]
Act = Callable[[Path, Observe], object]


@dataclass(frozen=True)
class Interruption:
    """`number` of `signal`, when: after `share` of the usual time, or at that share of the events or reward calls."""

    number: int
    when: str  # time, event, reward
    share: float


@dataclass
class Usual:
    """A life that nobody interrupts: its seconds, file events and reward calls, and the files that it leaves."""

    seconds: float
    events: int
    rewards: int
    tree: dict[str, str]


@dataclass
class Row:
    """A line of the table."""

    trials: int = 0
    lives: Counter[str] = field(default_factory=Counter)
    identical: int = 0
    slowest_stop: float = 0.0
    faults: list[str] = field(default_factory=list)


# -- what is interrupted ----------------------------------------------------------------------------------------------


def tabular(place: Path) -> Act:
    def act(root: Path, observe: Observe) -> object:
        return run.run(tiny.config(root, **tiny.EVERYTHING), tiny.objects(), observe=observe)

    return act


def text(place: Path) -> Act:
    """A language model and a reward model, which scores on the main thread, beside a callable on a thread."""
    kill.in_child(lambda: (save_tiny(place / "llama"), save_judge(place / "judge")))
    prompts = pa.table({"prompt": [f"say {word}" for word in "abcdefghijkl"]})
    config = {
        "num_rounds": 1,
        "prompts_per_round": 8,
        "data": {"prompts": "given as an object"},
        "policy": {"model": str(place / "llama"), "device": "cpu"},
        "sampling": {"num_generations": 3, "chunk_size": 4, "max_completion_length": 12, "batch_size": 8},
        "selection": {"beta": 0.1},
        "rewards": {"reward_funcs": [str(place / "judge")], "device": "cpu", "batch_size": 4},
        "training": {"learning_rate": 1e-3, "num_train_epochs": 2, "per_device_train_batch_size": 2},
        "evaluation": {"num_prompts": 3, "num_generations": 2},
        "engine": {"threads": 1},
        "report": False,
    }
    objects = PythonObjects(train=lambda: prompts, rewards=[shortness])

    def act(root: Path, observe: Observe) -> object:
        return run.run({"output_dir": str(root), **config}, objects, observe=observe)

    return act


def save_judge(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    save_backbone(folder, "llama")
    with quiet():
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)


def shortness(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-0.01 * len(completion) for completion in completions]


def fine_tuning(place: Path) -> Act:
    kill.in_child(lambda: save_tiny(place / "llama"))
    rows = [{"prompt": f"ask {i % 8} ", "completion": f"the cab {i % 3}"} for i in range(24)]
    config = {
        "threads": 1,
        "data": {"path": str(write(place / "rows.jsonl", rows)), "held_out_fraction": 0.2},
        "policy": {"model": str(place / "llama"), "device": "cpu"},
        "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 2},
    }

    def act(root: Path, observe: Observe) -> object:
        return sft(validate_as(SftConfig, {"output_dir": str(root), **config}), observe)

    return act


def reward_training(place: Path) -> Act:
    kill.in_child(lambda: save_backbone(place / "llama", "llama"))
    data = write(place / "marked.jsonl", marked(64))

    def act(root: Path, observe: Observe) -> object:
        return train(config_for(data, place / "llama", root, max_steps=10, allow_chance=True), observe)

    return act


SCENARIOS: dict[str, Callable[[Path], Act]] = {
    "tabular": tabular,
    "text": text,
    "sft": fine_tuning,
    "reward train": reward_training,
}


# -- one trial --------------------------------------------------------------------------------------------------------


def random_interruptions(rng: random.Random, usual: Usual) -> list[Interruption]:
    """One to four interruptions."""
    moments = ["time", "event", *(["reward"] if usual.rewards else [])]
    number = rng.randint(1, MOST_LIVES)
    return [Interruption(rng.choice(SIGNALS), rng.choice(moments), rng.uniform(0.02, 1.0)) for _ in range(number)]


def live(act: Act, root: Path, usual: Usual | None = None, blow: Interruption | None = None) -> tuple[int, str, float]:
    """The wait status of a life, what it wrote of errors, and the seconds from the signal to its end."""
    with tempfile.TemporaryFile("w+") as errors, tempfile.NamedTemporaryFile("r") as note:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os._exit(lived(act, root, Path(note.name), usual, blow))
        began = struck = time.monotonic()
        waits = usual.seconds * blow.share if usual and blow and blow.when == "time" else None
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            now = time.monotonic()
            if ended:
                break
            if waits is not None and now - began >= waits:
                os.kill(child, blow.number if blow else 0)
                waits, struck = None, now
            if now - began > HANGS:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -1, f"it hangs after {blow}", HANGS
            time.sleep(0.002)
        if blow and (told := note.read()):  # it struck itself, then
            struck = float(told)
        errors.seek(0)
        return status, errors.read(), time.monotonic() - struck


def lived(act: Act, root: Path, note: Path, usual: Usual | None, blow: Interruption | None) -> int:
    """The exit code of a life, in the fork."""
    count = Count(root, note, usual, blow)
    try:
        with interruptible(root) as observe:
            count.begin()
            act(root, observe)
    except Interrupted:
        return Interrupted.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    if usual is None:
        note.write_text(f"{len(count.watch.seen)} {count.rewards}")
    return 0


class Count:
    """Counts file events and reward calls in a life, and strikes it at the one that is meant."""

    def __init__(self, root: Path, note: Path, usual: Usual | None, blow: Interruption | None) -> None:
        self.note, self.blow, self.rewards = note, blow, 0
        at = {"event": usual.events, "reward": usual.rewards}.get(blow.when, 0) if usual and blow else 0
        self.at = max(1, round(at * blow.share)) if at and blow else None
        self.watch = Strikes(root, None)
        self.watch.strike = self.strike if blow and blow.when == "event" else (lambda number: None)

    def begin(self) -> None:
        self.watch.begin()
        asked = outcome.keywords

        def keywords(*args: Any) -> Any:
            self.rewards += 1
            if self.blow and self.blow.when == "reward":
                self.strike(self.rewards)
            return asked(*args)

        outcome.keywords = keywords

    def strike(self, number: int) -> None:
        if number == self.at and self.blow:
            self.note.write_text(str(time.monotonic()))
            os.kill(os.getpid(), self.blow.number)


class Strikes(kill.Watch):
    """A watch that says the number of each event."""

    strike: Callable[[int], None]

    def _record(self, kind: str, facts: tuple[Any, ...]) -> None:
        before = len(self.seen)
        super()._record(kind, facts)
        if len(self.seen) > before:
            self.strike(len(self.seen))


def usual_of(act: Act, root: Path) -> Usual:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "counts"
        status, errors = kill.in_child(lambda: os._exit(lived(act, root, note, None, None)))
        assert status == 0, errors
        events, rewards = map(int, note.read_text().split())
    return Usual(time.monotonic() - began, events, rewards, kill.tree(root))


def trial(act: Act, root: Path, usual: Usual, blows: list[Interruption], row: Row) -> str:
    """Empty if the interruptions leave no trace; else what is wrong. A life may end before its interruption."""
    allowed = {0, Interrupted.exit_code, *(-number for number in SIGNALS)}
    for blow in blows:
        status, errors, seconds = live(act, root, usual, blow)
        code = os.waitstatus_to_exitcode(status) if status != -1 else -1
        if code not in allowed or (code < 0 and code != -signal.SIGKILL and "Traceback" in errors):
            return f"{blow} ends it with {code}: {errors[-1500:]}"
        row.lives["ended before" if code == 0 else f"{signal.Signals(blow.number).name} {blow.when}"] += 1
        if code == Interrupted.exit_code:
            row.slowest_stop = max(row.slowest_stop, seconds)
    status, errors, _ = live(act, root)
    if status != 0:
        return f"it does not go on after {blows}: {errors[-1500:]}"
    fault = kill.difference(usual.tree, kill.tree(root))
    return f"after {blows}: {fault}" if fault else ""


# -- what is known to be bad ------------------------------------------------------------------------------------------


def break_interrupts() -> None:
    """A reward that is interrupted has an error, which is committed as data."""

    def attempt(reward: Any, batch: Any, **_: Any) -> Any:
        log = outcome.RewardLog()
        try:
            return outcome.judge(reward(**outcome.keywords(batch, log)), len(batch), log)
        except BaseException as error:
            return outcome.same_for_all(outcome.ScoreStatus.ERROR, type(error).__name__, len(batch))

    executors.attempt = attempt
    interruption.in_stretch = lambda: False  # and the interrupt is raised where the work is
    job.raise_if_asked = interruption.raise_if_asked = lambda: None


def break_checkpoints() -> None:
    """A fit goes on from the newest checkpoint by name, without the optimizer that it held."""

    def newest(work: Path, identity: str, required: frozenset[str]) -> tuple[Path | None, list[str]]:
        paths = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for path in paths[-1:]:
            (path / "optimizer.pt").unlink(missing_ok=True)
        return (paths[-1], []) if paths else (None, [])

    fit.newest_verified = newest


BROKEN: dict[str, tuple[str, Callable[[], None]]] = {
    "names": ("tabular", kill.break_names),
    "interrupts": ("text", break_interrupts),
    "checkpoints": ("sft", break_checkpoints),
}


# -- many trials ------------------------------------------------------------------------------------------------------


def run_trials(name: str, trials: int, seed: int, scratch: Path, breaks: Callable[[], None] | None = None) -> Row:
    """So many trials of a scenario; with something broken, until that is noticed."""
    place = scratch / name.replace(" ", "-")
    place.mkdir()
    act, row = SCENARIOS[name](place), Row()
    usual_of(act, place / "warm")
    usual = usual_of(act, place / "whole")
    if breaks is not None:
        breaks()
    for number in range(trials):
        root = place / "run"
        shutil.rmtree(root, ignore_errors=True)
        fault = trial(act, root, usual, random_interruptions(random.Random(f"{seed} {name} {number}"), usual), row)
        row.trials += 1
        row.identical += not fault
        row.faults += [f"seed {seed}, {name}, trial {number}: {fault}"] if fault else []
        if fault and breaks is not None:
            break
    return row


def show(rows: dict[str, Row]) -> None:
    titles = ("scenario", "trials", "identical", "interrupted", "in a reward", "ended before", "slowest stop")
    print("  ".join(f"{title:>12}" for title in titles))
    for name, row in rows.items():
        struck = sum(row.lives.values()) - row.lives["ended before"]
        inside = sum(count for what, count in row.lives.items() if what.endswith(" reward"))
        cells = (
            name,
            row.trials,
            row.identical,
            struck,
            inside,
            row.lives["ended before"],
            f"{row.slowest_stop:.1f} s",
        )
        print("  ".join(f"{cell:>12}" for cell in cells))
    for row in rows.values():
        print(*row.faults, sep="\n", end="\n" if row.faults else "")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=100, help="of all scenarios together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SCENARIOS)
    parser.add_argument("--broken", choices=BROKEN)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    files.sync = run_folder.sync = partial.sync = lambda *paths: None
    partial.SAVE_EVERY, partial.SHARE = 0.02, 1e9  # unfinished work and checkpoints at almost every step
    breaks = BROKEN[args.broken][1] if args.broken else None
    names = [BROKEN[args.broken][0]] if args.broken else [args.only] if args.only else list(SCENARIOS)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        each = -(-args.trials // len(names))
        rows = {name: run_trials(name, each, args.seed, Path(scratch), breaks) for name in names}
    if args.json:
        print(json.dumps({name: vars(row) for name, row in rows.items()}))
    else:
        show(rows)
    sys.exit(0 if breaks or not any(row.faults for row in rows.values()) else 1)


if __name__ == "__main__":
    main()
