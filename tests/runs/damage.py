"""Damages a finished run at random, runs a command on it, and says whether the command noticed what it read.

    python -m tests.runs.damage [--trials 300] [--seed 0] [--kind tabular|causal_lm|lora] [--commands 4] [--json]

Each trial copies a finished run, harms one file of it (a flipped bit, a cut, a deletion, a swap of two files, a surplus
copy, an edited JSON value), and gives the copy to some of the commands that read runs; with `--commands 0` to the six
that read a whole run (resume, verify, an export, evaluate, report, compare), and every file has its turn. A command
must end as on the whole run, with the same output, because it does not read that file; or with exit code 1 or 2 and an
error that names the file, or the stage that it belongs to. Or, of `resume`, with the whole run's bytes, made again.
Everything else is a fault: another output with exit code 0, an error that calls the damage a bug, a traceback. Every
command runs in a fork of a process that has imported all it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raftune.cli import main
from tests.runs.kill import tree

NOT_HARMED = ("report.html", "LOCK")
# Times are not hashed: of a changed value in this file only `verify` has to speak, where it can be seen at all.
TIMES = "events.jsonl"
NAMES_AND_GOES_ON = ("runs", "select")  # a damaged run in a list, a damaged round beside others
RUN, OTHER, OUT = "runs/harmed", "runs/whole", "out"
CAUGHT, UNREAD, FAULT = "caught", "not read", "FAULT"

REWARDS = """
def value(prompts, completions, **columns):
    return [float(answer) for answer in completions]

def best(prompts, completions, **columns):
    return [float(answer == 4) for answer in completions]

def short(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]
"""
TABULAR: dict[str, Any] = {
    "prompts_per_round": 8,
    "policy": {"family": "tabular", "num_prompts": 4, "num_answers": 5, "step": 0.5},
    "sampling": {"num_generations": 4, "chunk_size": 4},
    "selection": {"beta": 0.1},
    "rewards": {"reward_funcs": ["rewards.py:value"]},
    "evaluation": {"num_prompts": 4, "num_generations": 2, "reward_funcs": ["rewards.py:best"]},
}
CAUSAL_LM: dict[str, Any] = {
    "prompts_per_round": 4,
    "policy": {"model": "model"},
    "sampling": {"num_generations": 3, "chunk_size": 2, "max_completion_length": 6},
    "rewards": {"reward_funcs": ["rewards.py:short"]},
    "training": {"learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4},
    "evaluation": {"num_prompts": 2, "num_generations": 2},
}
COMMON = {"num_rounds": 2, "data": {"prompts": "train.jsonl"}, "engine": {"threads": 1}, "report": False}
LORA = CAUSAL_LM | {"policy": {"model": "model", "adapter": {"r": 2}}}
KINDS = {"tabular": TABULAR, "causal_lm": CAUSAL_LM, "lora": LORA}

COMMANDS: dict[str, list[str]] = {
    "resume": ["resume", RUN],
    "verify": ["verify", RUN],
    "export sft": ["export", RUN, "--format", "sft", "--out", f"{OUT}.jsonl"],
    "export preference": ["export", RUN, "--format", "preference", "--out", f"{OUT}.jsonl"],
    "export unpaired": ["export", RUN, "--format", "unpaired", "--out", f"{OUT}.parquet"],
    "export sft-tokens": ["export", RUN, "--format", "sft-tokens", "--out", f"{OUT}.jsonl"],
    "export model": ["export", RUN, "--format", "model", "--out", OUT],
    "evaluate": ["evaluate", RUN, "--output-dir", OUT],
    "report": ["report", RUN, "--json"],
    "compare": ["compare", RUN, OTHER, "--json"],
    "samples": ["samples", RUN, "--json", "-n", "99"],
    "samples held out": ["samples", RUN, "--held-out", "--json", "-n", "99"],
    "alarms": ["alarms", RUN, "--json"],
    "select": ["select", RUN, "--selection.rule", "top_m", "--selection.m", "2", "--json"],
    "runs": ["runs", "--json"],
}


SIX = ("resume", "verify", "export", "evaluate", "report", "compare")


@dataclass(frozen=True)
class Damage:
    """What was done, to which files."""

    kind: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, what it printed, and what it left on disk."""

    code: int
    out: str
    err: str
    left: str


@dataclass(frozen=True)
class Trial:
    """A command on a damaged run, and what came of it."""

    number: int
    damage: Damage
    command: str
    outcome: str
    why: str = ""


# -- the run -----------------------------------------------------------------------------------------------------------


def lay_out(folder: Path, kind: str) -> None:
    """A finished run of two rounds, and a second one like it to compare it with."""
    folder.mkdir(parents=True)
    texts = [f"say {word}" for word in "abcdefghijklmnop"]
    prompts = [number % 4 for number in range(20)] if kind == "tabular" else texts
    (folder / "train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "rewards.py").write_text(REWARDS)
    config = COMMON | KINDS[kind]
    if kind == "tabular":
        held_out = "".join(json.dumps({"prompt": label}) + "\n" for label in range(4))
        (folder / "held_out.jsonl").write_text(held_out)
        config = config | {"evaluation": {**TABULAR["evaluation"], "prompts": "held_out.jsonl"}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with in_folder(folder):
        if kind != "tabular":
            from tests.builders import save_tiny

            status, said = in_child(lambda: save_tiny(folder / "model"))
            assert status == 0, said
        ended = carry_out(["train", "run.yaml", "--output-dir", RUN])
        assert ended.code == 0, ended.err
        shutil.copytree(RUN, OTHER)


@contextlib.contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(root: Path, file: str, rng: random.Random) -> Damage:
    content = bytearray((root / file).read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    (root / file).write_bytes(content)
    return Damage("flip", (file,))


def cut(root: Path, file: str, rng: random.Random) -> Damage:
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: rng.randrange(len(content))])
    return Damage("cut", (file,))


def delete(root: Path, file: str, rng: random.Random) -> Damage:
    (root / file).unlink()
    return Damage("delete", (file,))


def swap(root: Path, file: str, rng: random.Random) -> Damage:
    """Swaps the file with another one of its kind and of other content."""
    content = (root / file).read_bytes()
    alike = [name for name in files_of(root) if Path(name).suffix == Path(file).suffix and name != file]
    alike = [name for name in alike if (root / name).read_bytes() != content]
    if not alike:
        return flip(root, file, rng)
    other = rng.choice(sorted(alike, key=lambda name: (Path(name).name != Path(file).name, name))[:8])
    (root / file).write_bytes((root / other).read_bytes())
    (root / other).write_bytes(content)
    return Damage("swap", (file, other))


def copy(root: Path, file: str, rng: random.Random) -> Damage:
    """Puts a second copy of a shard beside it, under a number or a name that no plan knows."""
    shards = [name for name in files_of(root) if re.search(r"/chunk-\d+\.parquet$", name)]
    source = rng.choice(shards)
    name = rng.choice(["chunk-00009.parquet", f"{Path(source).stem}-copy.parquet", "chunk-99999.parquet"])
    target = (Path(source).parent / name).as_posix()
    shutil.copy(root / source, root / target)
    return Damage("copy", (target,))


def edit(root: Path, file: str, rng: random.Random) -> Damage:
    """Changes one value in a JSON file, and writes the file as JSON files of a run are written."""
    names = [name for name in files_of(root) if name.endswith(".json")]
    file = file if file.endswith(".json") else rng.choice(names)
    value = json.loads((root / file).read_text())
    places = list(leaves(value)) if isinstance(value, dict | list) else []
    if not places:
        return flip(root, file, rng)
    holder, key = rng.choice(places)
    holder[key] = other_value(holder[key])
    (root / file).write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return Damage("edit", (file,))


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value that holds no list and no object."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if isinstance(inner, dict | list):
            yield from leaves(inner)
        else:
            yield value, key


def other_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value[::-1] if value[::-1] != value else f"{value}x"


DAMAGES: tuple[Callable[[Path, str, random.Random], Damage], ...] = (flip, flip, cut, delete, swap, copy, edit)


def files_of(root: Path) -> list[str]:
    """The files that may be harmed."""
    names = (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file())
    return [name for name in names if name not in NOT_HARMED and (root / name).stat().st_size]


# -- commands ----------------------------------------------------------------------------------------------------------


def in_child(act: Callable[[], object]) -> tuple[int, str]:
    """The exit status of a fork in which this was done, and its traceback."""
    with tempfile.TemporaryFile("w+") as errors:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            status = 0
            try:
                act()
            except BaseException:
                traceback.print_exc(file=errors)
                errors.flush()
                status = 99
            os._exit(status)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read()


def carry_out(tokens: list[str]) -> Ended:
    """Runs a command in a fork of this process, in the folder where it stands."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:

        def act() -> None:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = main(tokens)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        code, unforeseen = in_child(act)
        out.seek(0)
        err.seek(0)
        return Ended(code, steady(out.read()), err.read() + unforeseen, left_behind())


def steady(text: str) -> str:
    """What was printed, without times."""
    text = re.sub(r'"(when|seconds|time|made|written|began|ended)": ("[^"]*"|[\d.]+)', r'"\1": 0', text)
    return re.sub(r"\b\d+(\.\d+)? (s|min)\b", "0 s", text)


def left_behind() -> str:
    """A hash of what a command has written: the files of an export, the numbers of an evaluation, the run itself."""
    total = hashlib.sha256()
    for name in (OUT, f"{OUT}.jsonl", f"{OUT}.parquet"):
        path = Path(name)
        if (path / "round-0000").is_dir():
            total.update((path / "round-0000/evaluate/metrics.json").read_bytes())
        elif path.is_dir():
            without = {key: value for key, value in tree(path).items() if key != "README.md"}
            total.update(json.dumps(without, sort_keys=True).encode())
            if (path / "README.md").is_file():
                total.update(re.sub(r"\d+(\.\d+)? (s|min)\b", "0 s", (path / "README.md").read_text()).encode())
        elif path.suffix == ".parquet" and path.is_file():
            total.update(json.dumps(pq.read_table(path).to_pylist()).encode())
        elif path.is_file():
            total.update(path.read_bytes())
    return total.hexdigest()


def clear() -> None:
    for name in (OUT, f"{OUT}.jsonl", f"{OUT}.parquet"):
        shutil.rmtree(name, ignore_errors=True)
        Path(name).unlink(missing_ok=True)


# -- trials ------------------------------------------------------------------------------------------------------------


def judge(damage: Damage, command: str, ended: Ended, whole: Ended, mended: bool) -> tuple[str, str]:
    """What a command made of the damage, and why that is wrong where it is."""
    said = f"{ended.out}\n{ended.err}"
    if "Traceback" in ended.err or "a bug" in ended.err or ended.code not in (0, 1, 2):
        return FAULT, f"exit {ended.code}: {ended.err.strip()[-600:]}"
    if ended.code == whole.code == 0 and (ended.out, ended.left) == (whole.out, whole.left):
        if command == "verify" and not set(damage.files) <= {TIMES}:
            return FAULT, "verify says whole"
        if command == "resume" and not mended:
            return FAULT, "resume passed over the damage"
        return UNREAD, ""
    if command == "resume" and ended.code == 0 and mended and ended.out != whole.out:
        return CAUGHT, ""  # said, and made again
    if any(is_named(file, said) for file in damage.files):
        if ended.code or command in NAMES_AND_GOES_ON:
            return CAUGHT, ""
        return FAULT, f"exit 0 with another output: {ended.out[-300:]}"
    if damage.files == (TIMES,) and ended.code == 0:
        return UNREAD, ""  # times
    if ended.code != 0 and whole.code == ended.code and ended.err == whole.err:
        return UNREAD, ""  # the command means nothing to this family
    return FAULT, f"exit {ended.code} without naming the file: {said.strip()[-600:]}"


def is_named(file: str, said: str) -> bool:
    """Whether the text names the file, or the stage in whose folder it lies."""
    folder, _, name = file.rpartition("/")
    if not folder:
        return name in said
    match = re.match(r"round-(\d+)/(.*)", folder)
    assert match is not None, file
    number, stage = int(match[1]), match[2]
    places = [file, folder, f"round {number}, {stage}", f"{number}/{stage} "]
    while "/" in stage:  # a file in a folder of its own, such as a part of a pipeline
        stage = stage.rpartition("/")[0]
        places.append(f"round-{number:04d}/{stage}")
    return any(place in said for place in places)


def examine(scratch: Path, kind: str, trials: int, seed: int, commands: int = 4) -> list[Trial]:
    """So many trials of so many commands each on damaged copies of a run of this kind."""
    folder = scratch / kind
    lay_out(folder, kind)
    found: list[Trial] = []
    with in_folder(folder):
        pristine = Path(shutil.copytree(RUN, folder / "pristine"))
        whole = {}
        for name, tokens in COMMANDS.items():
            whole[name] = carry_out(tokens)
            restore(pristine)
        known = [name for name in COMMANDS if whole[name].code in (0, 2)]
        assert len(known) == len(COMMANDS), {name: whole[name].err for name in COMMANDS if name not in known}
        in_turn = files_of(pristine)
        random.Random(f"{seed}-{kind}").shuffle(in_turn)
        for number in range(trials):
            rng = random.Random(f"{seed}-{kind}-{number}")
            file, harm = rng.choice(files_of(pristine)), rng.choice(DAMAGES)
            if not commands:
                file = in_turn[number % len(in_turn)]
            state = rng.getstate()
            for name in rng.sample(list(COMMANDS), commands) if commands else six(rng):
                rng.setstate(state)
                damage = harm(Path(RUN), file, rng)
                ended = carry_out(COMMANDS[name])
                mended = name == "resume" and tree(Path(RUN)) == tree(pristine)
                outcome, why = judge(damage, name, ended, whole[name], mended)
                found.append(Trial(number, damage, name, outcome, why))
                restore(pristine)
    return found


def six(rng: random.Random) -> list[str]:
    exports = [name for name in COMMANDS if name.startswith("export")]
    return [rng.choice(exports) if name == "export" else name for name in SIX]


def restore(pristine: Path) -> None:
    shutil.rmtree(RUN)
    shutil.copytree(pristine, RUN)
    clear()


def table(found: Sequence[Trial]) -> str:
    """Outcomes by command."""
    lines = [f"{'command':<20}{CAUGHT:>10}{UNREAD:>10}{FAULT:>10}"]
    for name in COMMANDS:
        counts = Counter(trial.outcome for trial in found if trial.command == name)
        lines.append(f"{name:<20}{counts[CAUGHT]:>10}{counts[UNREAD]:>10}{counts[FAULT]:>10}")
    for trial in found:
        if trial.outcome == FAULT:
            lines.append(f"\n{trial.number} {trial.command}: {trial.damage.kind} {', '.join(trial.damage.files)}")
            lines.append(f"    {trial.why}")
    return "\n".join(lines)


def warm_up(kind: str) -> None:
    """Imports what commands need, so that a fork has it."""

    if kind != "tabular":
        import torch

        import tests.builders  # noqa: F401

        torch.set_num_threads(1)
    pa.set_cpu_count(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument(
        "--commands", type=int, default=4, help="generated for each damage; 0: the six, all files in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    os.environ["COLUMNS"] = "200"
    all_found: list[Trial] = []
    with tempfile.TemporaryDirectory() as place:
        for wanted in asked.kind or list(KINDS):
            warm_up(wanted)
            count = asked.trials // len(asked.kind or KINDS)
            found = examine(Path(place), wanted, count, asked.seed, asked.commands)
            all_found += found
            if not asked.json:
                print(f"{wanted}: {count} damages, {len(found)} commands\n{table(found)}\n")
    if asked.json:
        print(json.dumps([asdict(trial) for trial in all_found]))
    sys.exit(any(trial.outcome == FAULT for trial in all_found))
