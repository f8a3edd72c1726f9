"""What is to be evaluated: a model, or a round of a run, as the configuration of a run that trains nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raftune.config.load import merge, nested, read_yaml, validate
from raftune.config.run import RunConfig
from raftune.errors import ConfigError, StoreError
from raftune.policies.registry import family_of
from raftune.results.model_card import best_of, check_model
from raftune.results.summary import read_json
from raftune.sanitize import one_line, shell_command
from raftune.store.kinds import RUNS, is_run, model_in, was_run, why_no_run, written_by
from raftune.store.run import RunFolder

INHERITED = ("sampling", "rewards", "evaluation", "engine", "data")
# What only learning reads: in files it is passed over, as a flag it is refused with what to write instead.
LEARNING = {
    "selection": "",
    "training": "",
    "stop": "",
    "guards": "",
    "num_rounds": "",
    "prompts_per_round": "Prompts are counted by --evaluation.num_prompts.",
    "keep_models": "",
    "seed": "Answers are drawn by --evaluation.seed.",
    "sampling.num_generations": "Answers are counted by --evaluation.num_generations.",
    "sampling.teacher": "",
    "sampling.candidate_columns": "",
}
PLACE = ("name", "output_dir")  # of a run that learns: an evaluation has its own


@dataclass(frozen=True)
class EvalTarget:
    """`words` name it; `inherited` is what files and flags go over; `policy` goes over the files; `run` and `round` say
    where it is from, None for a model that is no run's."""

    words: str
    name: str
    inherited: Mapping[str, Any]
    policy: Mapping[str, Any]
    run: Path | None = None
    round: int | None = None


def subject_of(text: str) -> EvalTarget:
    """The subject that MODEL, RUN or RUN@ROUND stands for. Raises ConfigError, StoreError."""
    run, round_ = run_and_round(text)
    if run is not None:
        return round_of(run, round_)
    path = Path(text)
    if was_run(path):
        raise StoreError(why_no_run(path))
    if written_by(path) == "raftune reward train":
        raise ConfigError(
            f"MODEL must be a model that answers, or a run; {path} holds a reward model. To judge by it write "
            f"`{shell_command('raftune', 'evaluate', 'MODEL', '--rewards.reward_funcs', model_in(path))}`."
        )
    if not path.exists() and is_run(RUNS / (text.rpartition("@")[0] or text)):
        raise ConfigError(f"there is no {path} here; did you mean {RUNS / path}?")
    text = str(model_in(path)) if written_by(path) else text
    return EvalTarget(text, f"evaluation-{plain_name(text)}", {}, {"model": text})


def run_and_round(text: str) -> tuple[RunFolder | None, str]:
    """The run that the text names, if it names one, and which of its rounds: `best` where it does not say."""
    if RunFolder(text).exists():
        return RunFolder(text), "best"
    path, at, round_ = text.rpartition("@")
    if at and RunFolder(path).exists():
        return RunFolder(path), round_
    return None, ""


def round_of(run: RunFolder, which: str) -> EvalTarget:
    """A round of a run, with what the run draws, scores and judges by. Raises ConfigError, StoreError."""
    round_ = number_of(run, which)
    check_model(run, round_)
    config = run.configuration()
    plain = config.model_dump(mode="json")
    folder, start = run.folder(round_, "model").resolve(), run.folder(0, "model").resolve()
    begun_at = getattr(family_of(config), "section_at", None)
    policy = begun_at(plain["policy"], folder, start) if begun_at else {**plain["policy"], "model": str(folder)}
    inherited = {name: dict(plain[name]) for name in INHERITED}
    inherited["data"] |= {"prompts": str(run.root), "limit": None}
    inherited["evaluation"] |= {"prompts": str(run.root), "best_by": "reward"}
    if not inherited["evaluation"]["num_prompts"]:  # the run was not evaluated: its prompts were not held out either
        del inherited["evaluation"]["num_prompts"]
    words = f"round {round_} of {run.root}" if round_ else f"the start of {run.root}"
    return EvalTarget(words, f"evaluation-{config.name}-round-{round_}", inherited, policy, run.root, round_)


def number_of(run: RunFolder, which: str) -> int:
    """The round that best, last, start or a number stands for. Raises ConfigError, StoreError."""
    if which == "best":
        return best_of(run)
    known = run.rounds_with("model")
    names = {"start": 0, "last": known[-1] if known else 0}
    if which not in names and not (which.isdigit() and int(which) in known):
        whole = ", ".join(map(str, known)) or "none yet"
        raise ConfigError(
            f"RUN@ROUND must name best, last, start or a round that is done ({whole}); got {which!r}. "
            f"Write {run.root}@best."
        )
    return names[which] if which in names else int(which)


def evaluation_of(subject: EvalTarget, files: Sequence[str | Path], flags: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run of no rounds that evaluates the subject: what it inherits < files < itself < flags.

    Raises ConfigError, also for a flag that only learning reads.
    """
    for flag in flags:
        if name := next((name for name in LEARNING if f"{flag}.".startswith(f"{name}.")), None):
            raise ConfigError(
                f"--{flag} means nothing to an evaluation, which learns nothing. {LEARNING[name]}".strip()
            )
    own = {"name": subject.name, "num_rounds": 0, "policy": subject.policy, "evaluation": {"kl": False}}
    layers = [without_learning(layer) for layer in (subject.inherited, *map(read_yaml, files))]
    return validate(merge([*layers, own, nested(flags)]))


def without_learning(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The layer without what only learning reads, and without the place of a run that learns."""
    kept = {name: value for name, value in layer.items() if name not in (*LEARNING, *PLACE)}
    if isinstance(sampling := kept.get("sampling"), Mapping):
        kept["sampling"] = {name: value for name, value in sampling.items() if f"sampling.{name}" not in LEARNING}
    return kept


def refuse_training_run(root: Path) -> None:
    """Raises ConfigError where the directory holds a run that learns: its configuration would be written over."""
    folder = RunFolder(root)
    if folder.exists() and (rounds := folder.read_config().get("num_rounds")):
        raise ConfigError(
            f"output_dir must be a directory of the evaluation's own; {root} holds a run of {rounds} rounds. Choose "
            "another with --output-dir."
        )


def prompts_judged(root: Path) -> dict[str, int]:
    """How many prompts an evaluation has, and how many of them are also trained on."""
    notes = read_json(root / "round-0000" / "data" / "notes.json")
    return {name: int(notes.get(name, 0)) for name in ("held_out", "overlap", "train")}


def plain_name(text: str) -> str:
    """The last part of a path or hub name, in letters that a run's name may have."""
    last = one_line(text).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last).strip(".-_")[:80] or "model"
