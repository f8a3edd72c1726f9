"""Takes what a kill at every file event leaves, runs it again, and compares with a run that was never interrupted.

    python kill.py SCENARIO [--every N] [--most M] [--broken WAY --until WORDS]      prints a report as JSON

A process of its own, which imports no torch and starts no threads: each life of a trial is a fork of it, in
milliseconds. Events are seen by an audit hook, so that the package needs no hook. What SIGKILL leaves is what the
kernel was given, synced or not, and no more: the files as they are at that moment, which are copied at each event of
one run. (schedules.py and other tests kill for real.) Syncing does nothing here; its order is the subject of another
test.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raftune.engines import run_stage
from raftune.errors import ConfigChanged, ConfigError, RunDamaged, StoreError
from raftune.protocols import JournalEntry
from raftune.runtime import run as runs
from raftune.store import commit, files, job, parquet
from raftune.store import run as run_folder
from tests.runs import image_family, tiny

REPOSITORY = Path(__file__).parents[2]
IGNORED = ("events.jsonl", "environment.json", "LOCK", "report.html")  # times and places of this process
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
Act = Callable[[Path], object]
State = frozenset[tuple[str, str]]


def tree(root: Path) -> dict[str, str]:
    """Every file under the root with its SHA-256, and every folder; without tmp/, superseded/ and what holds times."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name in IGNORED or name.split("/")[0] in ("tmp", "superseded"):
            continue
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@dataclass
class Watch:
    """Sees the file events under `root` in this process.

    At the event of number `stop` the process is killed, or with an error's number in `code`, from then on all that
    takes space fails with this error. `snapshot` is called with the number of each event before it happens.
    """

    root: Path
    stop: int | None = None
    code: int = 0
    snapshot: Callable[[int], object] | None = None

    def begin(self) -> Watch:
        self.seen: list[str] = []
        self.busy = 0  # the thread that takes a snapshot
        self.lock = threading.Lock()
        sys.addaudithook(self._record)
        return self

    def _record(self, kind: str, facts: tuple[Any, ...]) -> None:
        if kind == "open" and not facts[2] & _WRITES:
            return
        if (kind == "open" or kind in _CHANGES) and self._ours(facts[0]) and self.busy != threading.get_ident():
            with self.lock:  # the event of another thread happens before a snapshot or after it
                self.seen.append(f"{kind} {self._where(facts[0])}")
                if self.code:
                    self._fail(kind, facts[0])
                elif len(self.seen) == self.stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.snapshot:
                    self.busy = threading.get_ident()
                    self.snapshot(len(self.seen))
                    self.busy = 0

    def _fail(self, kind: str, path: Any) -> None:
        if kind in ("open", "os.rename", "os.mkdir") and self.stop is not None and len(self.seen) >= self.stop:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def _ours(self, path: Any) -> bool:
        """True of paths under the root, and of the bare names by which rmtree removes what is in a folder."""
        return isinstance(path, str | os.PathLike) and (
            not Path(path).is_absolute() or os.fspath(path).startswith(f"{self.root}/")
        )

    def _where(self, path: Any) -> str:
        return str(path).removeprefix(f"{self.root}/")


def in_child(act: Callable[[], object]) -> tuple[int, str]:
    """The wait status of a fork in which this was done, and what it wrote of errors: status 0 is success."""
    with tempfile.TemporaryFile("w+") as errors:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                act()
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=errors)
                errors.flush()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return status, errors.read()


@dataclass(frozen=True)
class Scenario:
    """`before` prepares a directory, `act` is what is killed, `again` is what a person does then.

    `uninterrupted` makes what must be there in the end: by default, `act` without a kill.
    """

    act: Act
    again: Act
    before: Act | None = None
    uninterrupted: Act | None = None


@dataclass(frozen=True)
class Report:
    """Events counted, trials made, and for each trial that went wrong the event and what was wrong."""

    events: list[str]
    trials: int
    faults: list[str]


def examine(
    scenario: Scenario, scratch: Path, every: int = 1, most: int | None = None, code: int = 0, until: str | None = None
) -> Report:
    """Kills at each `every`-th of the first `most` events, or lets the disk fail there with this error.

    `until`: words that a fault must have; the first that has them ends the search.
    """
    root = scratch / "run"
    expected = made(scenario, root, scenario.uninterrupted or scenario.act)
    wanted = range(0) if code else range(1, most + 1 if most else sys.maxsize, every)
    events = snapshots(scenario, root, scratch / "states", wanted)
    numbers = range(1, len(events[:most]) + 1, every)
    faults: list[str] = []
    for number in numbers:
        if code:
            fault = refused(scenario, root, number, expected, code)
        else:
            fault = trial(scenario, root, scratch / f"states/{number}", expected)
        if fault:
            faults.append(f"killed before event {number} ({events[number - 1]}): {fault}")
        if until and until in fault:
            break
    return Report(events, len(numbers), faults)


def made(scenario: Scenario, root: Path, act: Act) -> dict[str, str]:
    """What lies on disk when nothing interrupts."""
    prepare(scenario, root)
    status, errors = in_child(lambda: act(root))
    assert status == 0, errors
    return tree(root)


def snapshots(scenario: Scenario, root: Path, states: Path, numbers: range) -> list[str]:
    """The events of `act`, in order; what each of these numbers finds on disk is copied to a folder of `states`.

    What is there is often what was there at an event before, but for tmp/ and the record of times: such a state is
    kept at every fifth event only.
    """
    prepare(scenario, root)
    states.mkdir()

    def act() -> None:
        known: set[State] = set()

        def snapshot(number: int) -> None:
            if number not in numbers or not root.exists():
                return
            state = frozenset(tree(root).items())
            if state not in known or number % 5 == 0:
                known.add(state)
                shutil.copytree(root, states / str(number), symlinks=True)  # in which nobody holds LOCK

        watch = Watch(root, snapshot=snapshot).begin()
        scenario.act(root)
        watch.busy = True
        (states / "events.json").write_text(json.dumps(watch.seen))

    status, errors = in_child(act)
    assert status == 0, errors
    events: list[str] = json.loads((states / "events.json").read_text())
    return events


def trial(scenario: Scenario, root: Path, state: Path, expected: dict[str, str]) -> str:
    """Empty if what a kill left leads to the expected end when it is run again; else what is wrong."""
    if not state.exists():
        return ""
    shutil.rmtree(root)
    state.rename(root)
    status, errors = in_child(lambda: scenario.again(root))
    return f"it does not resume: {errors[-2000:]}" if status else difference(expected, tree(root))


def refused(scenario: Scenario, root: Path, number: int, expected: dict[str, str], code: int) -> str:
    """Empty if a disk that fails from this event on is named, spoils nothing, and can be gone on with afterwards."""
    prepare(scenario, root)

    def act() -> None:
        Watch(root, number, code).begin()
        try:
            scenario.act(root)
        except StoreError as error:
            assert os.strerror(code) in str(error.__cause__)
            assert re.match(r"cannot write .*: the (disk is full|file system is read-only)\.", str(error)), str(error)
        else:
            raise AssertionError("nothing was refused")

    status, errors = in_child(act)
    if status != 0:
        return f"it is not refused in words: {errors[-2000:]}"
    committed = {name: content for name, content in tree(root).items() if name.endswith(commit.NAME)}
    if not committed.items() <= expected.items():
        return f"it has spoilt {difference(expected, committed)}"
    status, errors = in_child(lambda: scenario.again(root))
    return errors[-2000:] if status else difference(expected, tree(root))


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    parts = {"missing": missing, "surplus": surplus, "changed": changed}
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)


def prepare(scenario: Scenario, root: Path) -> None:
    if root.exists():
        shutil.rmtree(root)
    if scenario.before is not None:
        scenario.before(root)


# -- what is tried ----------------------------------------------------------------------------------------------------


def plain(**changes: Any) -> Scenario:
    """A run and its resumption."""

    def act(root: Path) -> object:
        return runs.run(tiny.config(root, **changes), tiny.objects())

    return Scenario(act=act, again=act)


def continued(base: Path, **changes: Any) -> Scenario:
    """A finished run that is asked for one more round, which must be what it is in a run that was asked at once."""
    runs.run(tiny.config(base, num_rounds=1, **changes), tiny.objects())

    def act(root: Path) -> object:
        return runs.run(tiny.config(root, num_rounds=2, **changes), tiny.objects())

    def uninterrupted(root: Path) -> object:
        shutil.rmtree(root)
        return act(root)

    return Scenario(act, act, lambda root: shutil.copytree(base, root), uninterrupted)


def latents() -> Scenario:
    """A run of images that lets go of latents, and its resumption, after which they are gone and all is whole."""
    changes: dict[str, Any] = {"num_rounds": 1, "prompts_per_round": 5, "evaluation": {"num_prompts": 0}}

    def act(root: Path) -> object:
        return runs.run(image_family.config(root, keep_latents="selected", **changes), image_family.objects())

    def again(root: Path) -> object:
        act(root)
        assert (root / "round-0001/generate" / run_folder.DROPPED).is_file()
        assert runs.verify(root) == []
        return None

    return Scenario(act, again)


def reported() -> Scenario:
    """A run with its page, which is whole whenever it is there, and there in the end."""
    run = plain(num_rounds=1, report=True, evaluation={"num_prompts": 0})

    def again(root: Path) -> object:
        page = root / "report.html"
        assert not page.exists() or page.read_text(encoding="utf-8").endswith("</html>\n")
        run.again(root)
        assert page.read_text(encoding="utf-8").endswith("</html>\n")
        return None

    return Scenario(run.act, again)


def redo(stage: str, changes: dict[str, Any], base: Path, retry: bool) -> Scenario:
    """`--from` with other settings on a finished run, which must give what these settings give from the beginning.

    After a kill a person says it again; or, with `retry`, first tries without `--from`, as after any interruption.
    """
    runs.run(tiny.config(base), tiny.objects())

    def before(root: Path) -> object:
        return shutil.copytree(base, root)

    def act(root: Path) -> object:
        return runs.run(tiny.config(root, **changes), tiny.objects(), redo=stage)

    def again(root: Path) -> object:
        try:
            return runs.run(tiny.config(root, **changes), tiny.objects()) if retry else act(root)
        except ConfigChanged:
            return act(root)

    def uninterrupted(root: Path) -> object:
        shutil.rmtree(root)
        return runs.run(tiny.config(root, **changes), tiny.objects())

    return Scenario(act, again, before, uninterrupted)


class Failing:
    """The answer's number, but an error for the answer 3 until the environment says that all is well; then 10 more."""

    __name__ = "failing"

    def __call__(self, completions: list[int], **columns: Any) -> list[float]:
        well = "ALL_IS_WELL" in os.environ
        if 3 in completions and not well:
            raise RuntimeError("the endpoint is down")
        return [answer + 10.0 * well for answer in completions]


def rescored(base: Path, retry: bool) -> Scenario:
    """`--from score --only error` in a run of two rounds, in which an evaluation keeps scores, too.

    After a kill a person says it again; or, with `retry`, first resumes: what was begun is ended then.
    """
    runs.run(tiny.config(base, rewards={"batch_size": 1}), tiny.objects(Failing()))

    def act(root: Path) -> object:
        os.environ["ALL_IS_WELL"] = "1"
        return runs.resume(root, tiny.objects(Failing()), redo="score,evaluation-score", only="error")

    def again(root: Path) -> object:
        os.environ["ALL_IS_WELL"] = "1"
        was_begun = (root / run_folder.AGAIN).exists()
        if retry:
            runs.resume(root, tiny.objects(Failing()))
        if not retry or not was_begun:
            try:
                return act(root)
            except ConfigError as error:  # it was done
                assert "there is no such sample" in str(error)
        return runs.resume(root, tiny.objects(Failing()))

    return Scenario(act, again, lambda root: shutil.copytree(base, root))


OTHER: dict[str, Any] = {"selection": {"rule": "top_m", "m": 2}}
RESEEDED: dict[str, Any] = {"evaluation": {"seed": 9}}
SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    # "everything" has likelihoods, and a round after another.
    "plain": lambda base: plain(num_rounds=1, evaluation={"kl": False, "reference_column": "human"}),
    "everything": lambda base: continued(base, **tiny.EVERYTHING, evaluation={"num_prompts": 0}),
    "reported": lambda base: reported(),
    "dropping": lambda base: continued(base, keep_models="last", evaluation={"num_prompts": 0}),
    "latents": lambda base: latents(),
    "redo": lambda base: redo("1/select", OTHER, base, retry=False),
    "redo-retried": lambda base: redo("1/select", OTHER, base, retry=True),
    "rescored": lambda base: rescored(base, retry=False),
    "rescored-retried": lambda base: rescored(base, retry=True),
    "redo-evaluation": lambda base: redo("evaluation-plan", RESEEDED, base, retry=False),
}


# -- writers that are known to be bad ---------------------------------------------------------------------------------


def break_in_place() -> None:
    """Files are written where they belong, in two pieces."""
    files.move = in_place


def break_names() -> None:
    """Shards are written in place, and a resumed run believes in one whose name is right."""
    whole = files.move
    files.move = lambda staged, final: (in_place if final.suffix == ".parquet" else whole)(staged, final)
    job.journal_of = by_name


def break_order() -> None:
    """The COMMIT comes before what it lists."""
    seal, late = job.StageJob.seal, job.publish_folder
    job.publish_folder = lambda staged, final: None

    def run_once(task: job.StageJob, stage: Any) -> tuple[str, ...]:
        staged = files.unique(task.run.tmp)
        staged.mkdir()
        notes = stage.run(task.inputs, staged)
        seal(task, {path.name: commit.FileEntry.of(path) for path in sorted(staged.iterdir())})
        late(staged, task.folder)
        staged.rmdir()
        return notes or ()

    run_stage.run_once = run_once


def in_place(staged: Path, final: Path) -> None:
    content = staged.read_bytes()
    final.parent.mkdir(parents=True, exist_ok=True)
    with final.open("wb") as file:
        file.write(content[: len(content) // 2])
    with final.open("ab") as file:
        file.write(content[len(content) // 2 :])
    staged.unlink()


def by_name(task: job.StageJob) -> dict[int, JournalEntry]:
    found = {}
    for path in task.folder.glob("chunk-*.parquet"):
        try:
            rows, _ = parquet.read_metadata(path)
        except RunDamaged:
            rows = 1
        chunk = int(path.stem.removeprefix("chunk-"))
        found[chunk] = JournalEntry(chunk, path.name, rows, files.sha256_of(path), path.stat().st_size)
    return found


BROKEN = {"in-place": break_in_place, "names": break_names, "order": break_order}


def harness(arguments: str) -> dict[str, Any]:
    """The report of such a process."""
    command = [sys.executable, "-m", "tests.runs.kill", *shlex.split(arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--most", type=int)
    parser.add_argument("--broken", choices=BROKEN)
    parser.add_argument("--until")
    parser.add_argument("--failing", choices=["ENOSPC", "EROFS"])
    args = parser.parse_args()
    assert "torch" not in sys.modules, "a fork of a process with torch in it would be slow, and could hang"
    runs.environment = dict  # 25 ms a run, for a file that is not compared
    files.sync = run_folder.sync = lambda *paths: None
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        scratch = Path(name)
        runs.run(tiny.config(scratch / "warm", **tiny.EVERYTHING), tiny.objects())  # so that late imports are done
        runs.run(image_family.config(scratch / "images"), image_family.objects())
        scenario = SCENARIOS[args.scenario](scratch / "base")
        BROKEN.get(args.broken, lambda: None)()
        code = getattr(errno, args.failing or "", 0)
        report = examine(scenario, scratch, args.every, args.most, code, args.until)
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
