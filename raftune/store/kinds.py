"""Tells what a directory holds: a run, an evaluation, a model, or another command's output."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raftune.sanitize import shell_command

RUN_CONFIG = "config.resolved.json"
REWARD_NOTES = "raftune_reward.json"  # beside the weights of a model that `raftune reward train` wrote
RUNS = Path("runs")  # where runs go that are given no directory


def is_run(path: Path) -> bool:
    """Whether the directory holds a run, or an evaluation, which is a run of no rounds."""
    return (path / RUN_CONFIG).is_file()


def was_run(path: Path) -> bool:
    """Whether the directory holds the rounds of a run whose configuration is gone."""
    return not is_run(path) and (path / "round-0000").is_dir()


def is_evaluation(config: Mapping[str, Any]) -> bool:
    """Whether a run with this configuration trains nothing and only evaluates its initial model."""
    return config.get("num_rounds") == 0


def written_by(path: Path) -> str | None:
    """The command that wrote this directory, if it is `raftune sft` or `raftune reward train`."""
    if (path / "model" / REWARD_NOTES).is_file():
        return "raftune reward train"
    names = ("config.yaml", "rows.parquet", "report.json")
    return "raftune sft" if all((path / name).is_file() for name in names) and not is_run(path) else None


def model_in(path: Path) -> Path:
    """The folder itself, or the model in it where `raftune sft` or `raftune reward train` wrote it."""
    return path / "model" if written_by(path) and (path / "model").is_dir() else path


def why_no_run(path: Path) -> str:
    """Why this path is no run, and what to do instead."""
    head = f"{path} holds no run"
    if was_run(path):
        return f"{path / RUN_CONFIG} is missing: it is the run's configuration. Restore it."
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return f"{head}: it is a configuration. `{shell_command('raftune', 'train', path)}` runs it."
    for parent in (*path.parents, *path.absolute().parents):
        if is_run(parent):
            return f"{head}: it is in the run {parent if parent.name else parent.absolute()}. Name that."
    if (command := written_by(path)) is not None:
        return f"{head}: it is what `{command}` wrote. Its model is {path / 'model'}."
    if (path / "config.json").is_file() or (path / "model_index.json").is_file():
        return f"{head}: it is a model. `{shell_command('raftune', 'evaluate', path)}` measures it."
    if path.is_dir() and (inside := [child.name for child in sorted(path.iterdir()) if is_run(child)]):
        more = f" and {len(inside) - 8} more" if len(inside) > 8 else ""
        return f"{head} itself, but the runs {', '.join(inside[:8])}{more}. Name one of them."
    if not path.exists():
        meant: str | None = None
        run, at, round_ = path.name.rpartition("@")
        if at and is_run(path.with_name(run)):
            meant = f"{path.with_name(run)} --round {round_}"
        else:
            folders = [folder for folder in (RUNS, path.parent) if folder.is_dir()]
            runs = {child.name: child for folder in folders for child in folder.iterdir() if is_run(child)}
            close = difflib.get_close_matches(path.name, runs, n=1, cutoff=0.6)
            meant = str(runs[close[0]]) if close else None
        if meant is not None:
            return f"{head}: there is nothing of that name. Did you mean {meant}?"
    missing = "it is a file" if path.is_file() else f"{RUN_CONFIG} is missing"
    return f"{head}: {missing}. `raftune runs` lists the runs in a folder."


def how_to_go_on(root: Path, config: Mapping[str, Any]) -> str:
    """What to do with a run that has not come far enough, or is an evaluation."""
    if is_evaluation(config):
        command = shell_command("raftune", "samples", root)
        return f"It is an evaluation: it trains no rounds. `{command}` shows its samples."
    return f"`{shell_command('raftune', 'resume', root)}` goes on with it."
