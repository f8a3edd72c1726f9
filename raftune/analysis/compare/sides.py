"""Loads one side of a comparison: the held-out samples of a round and their settings."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raftune.arrays import FloatArray
from raftune.config.rewards import RewardsConfig
from raftune.errors import ConfigError, StoreError
from raftune.records import Prompt
from raftune.results import samples as ledger
from raftune.results.summary import best_round
from raftune.sanitize import shell_command
from raftune.stages.plan import read_plan, read_prompts
from raftune.store.layout import chunk_file
from raftune.store.parquet import column_names, read_table
from raftune.store.run import RunFolder

PairKey = tuple[str, int, int | None]
GENERATED = ("sample_id", "prompt_id", "k", "seed", "completion", "completion_ids", "invalid")
# The folder of scores, the section of the configuration that names its rewards, and what its score is called here.
SCORED = {"reward": ("score", "rewards"), "held_out": ("judge", "evaluation")}


@dataclass(frozen=True)
class ComparedRun:
    """The held-out samples of one round of a run."""

    run: RunFolder
    round: int
    chosen: str

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.run.read_config()

    @cached_property
    def folder(self) -> Path:
        return self.run.folder(self.round, "evaluate")

    @cached_property
    def plan(self) -> dict[str, Any]:
        return read_plan(self.folder / "plan")

    @cached_property
    def chunks(self) -> list[int]:
        """The chunks that were generated, scored and judged: those that were set aside are none; one that was lost
        is.
        """
        names = ("generate", "score", *(["judge"] if self.is_judged else []))
        commits = [self.run.commit(self.round, f"evaluate/{name}") for name in names]
        held = [{name for name in commit.files if name.endswith(".parquet")} for commit in commits if commit]
        return sorted(int(Path(name).stem.removeprefix("chunk-")) for name in set.intersection(*held))

    @property
    def is_judged(self) -> bool:
        return self.run.was_made(self.round, "evaluate/judge")

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The prompts by id, with the columns that ride along."""
        return {prompt.id: prompt for chunk in self.chunks for prompt in read_prompts(self.folder / "plan", chunk)}

    @cached_property
    def samples(self) -> pa.Table:
        """One row a sample: prompt_id, k, seed, completion and, where there are any, completion_ids."""
        return pa.concat_tables([self._drawn(chunk) for chunk in self.chunks])

    @cached_property
    def keys(self) -> dict[PairKey, int]:
        """The row of each sample by its prompt, number and seed."""
        names = (self.samples.column(name).to_pylist() for name in ("prompt_id", "k", "seed"))
        return {key: row for row, key in enumerate(zip(*names, strict=True))}

    @cached_property
    def scores(self) -> dict[str, FloatArray]:
        """(N,) `reward`, `reward/NAME`, `held_out`, `held_out/NAME`, in the order of samples; NaN where it failed."""
        found: dict[str, FloatArray] = {}
        for name, (folder, _) in SCORED.items():
            if folder == "judge" and not self.is_judged:
                continue
            tables = [read_table(self.folder / folder / chunk_file(chunk)) for chunk in self.chunks]
            table = pa.concat_tables(tables, promote_options="default")  # not every chunk has each logged column
            found[name] = ok(table, "score", "status")
            for column in table.column_names:
                if column.startswith("rewards/"):
                    part = column.removeprefix("rewards/")
                    found[f"{name}/{part}"] = ok(table, column, f"status/{part}")
        return found

    def parts(self, name: str) -> list[str]:
        """The names of the rewards whose sum this score is."""
        return [key.removeprefix(f"{name}/") for key in self.scores if key.startswith(f"{name}/")]

    def fingerprint(self, name: str) -> str:
        """What stands for code, options and weights of the rewards behind this score."""
        commit = self.run.commit(self.round, f"evaluate/{SCORED[name][0]}")
        return str(commit.fields.get("hash of rewards", "")) if commit is not None else ""

    def specs(self, name: str) -> dict[str, dict[str, Any]]:
        """The rewards behind this score by name, as the configuration has them; not those given as objects."""
        funcs = self.config.get(SCORED[name][1], {}).get("reward_funcs", ())
        config = RewardsConfig.model_validate({"reward_funcs": funcs})
        listed = [spec.model_dump(mode="json") for spec in config.reward_funcs]
        return dict(zip(config.names, listed, strict=True))

    @cached_property
    def drawn_by(self) -> Mapping[str, Any]:
        """The options that the samples were generated with, by dotted field."""
        commit = self.run.commit(self.round, "evaluate/generate")
        fields = commit.fields if commit is not None else {}
        return {name: value for name, value in fields.items() if name.startswith("sampling.")}

    @property
    def words(self) -> str:
        """The side as a person would call it."""
        if not self.config.get("num_rounds"):  # an evaluation: what matters is whose
            model = self.config["policy"].get("model")
            return f"{self.run.root}, an evaluation" + (f" of {model}" if model else "")
        round_ = "the start" if self.round == 0 else f"round {self.round}"
        return f"{self.run.root}, {round_}{' (the best)' if self.chosen == 'best' else ''}"

    def _drawn(self, chunk: int) -> pa.Table:
        path = self.folder / "generate" / chunk_file(chunk)
        present = column_names(path)
        return read_table(path, [name for name in GENERATED if name in present])


def ok(table: pa.Table, column: str, status: str) -> FloatArray:
    """(N,) the column's values, NaN where the status is not ok."""
    values = table.column(column).to_numpy(zero_copy_only=False).astype(np.float64)
    fine = np.array([found == "ok" for found in table.column(status).to_pylist()])
    return np.where(fine, values, np.nan)


def choose(reference: str, letter: str) -> ComparedRun:
    """The side that `RUN`, `RUN@3`, `RUN@best`, `RUN@last` or `RUN@start` names. Raises ConfigError, StoreError.

    Without a round it is the best one, or the only one that was evaluated.
    """
    path, wanted = split(reference)
    run = RunFolder(path)
    run.read_config()
    judged = run.rounds_with("evaluate/score")
    if not judged:
        raise StoreError(
            f"{letter}: {path} holds no evaluation yet. `{shell_command('raftune', 'evaluate', path)}` makes one, "
            f"`{shell_command('raftune', 'resume', path)}` goes on with a run."
        )
    round_, chosen = number_of(run, wanted, judged, letter)
    if round_ not in judged:
        raise ConfigError(
            f"{letter}: round {round_} of {path} was not evaluated; there are {ledger.span(judged)}. Choose one."
        )
    return ComparedRun(run, round_, chosen)


def split(reference: str) -> tuple[str, str | None]:
    """The run's folder and the round that is wanted; an @ in the folder's own name is none of ours."""
    path, at, wanted = reference.rpartition("@")
    if not at or Path(reference).is_dir() or "/" in wanted:
        return reference, None
    return path, wanted


def number_of(run: RunFolder, wanted: str | None, judged: list[int], letter: str) -> tuple[int, str]:
    """The round's number, and by which word it was chosen."""
    if wanted is None and len(judged) == 1:
        return judged[0], ""
    if wanted in (None, "best"):
        best = best_round(run.root)
        if best is None:
            raise StoreError(
                f"{letter}: {run.root} has no best round yet. Name one, such as {run.root}@{judged[-1]}, or go on "
                f"with `{shell_command('raftune', 'resume', run.root)}`."
            )
        return best, "best"
    if wanted in ("start", "last"):
        return (0 if wanted == "start" else judged[-1]), wanted
    if wanted is not None and wanted.isdecimal():
        return int(wanted), ""
    near = difflib.get_close_matches(str(wanted), ["best", "last", "start"], n=1)
    hint = f"Did you mean {run.root}@{near[0]}?" if near else f"Write {run.root}@{judged[-1]}, for example."
    raise ConfigError(f"{letter}: a round is a number, best, last or start; got {wanted!r}. {hint}")
