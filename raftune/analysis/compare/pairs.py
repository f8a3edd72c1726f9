"""Loads the two sides of a comparison, held-out samples of a round each, and pairs them by prompt and seed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

from raftune.arrays import FloatArray, IntArray
from raftune.errors import ConfigError, DataError, StoreError
from raftune.evaluation.bootstrap import usable
from raftune.records import Prompt
from raftune.results.samples import span
from raftune.results.summary import best_round
from raftune.sanitize import counted, shell_command
from raftune.stages.plan import read_plan, read_prompts
from raftune.store.layout import chunk_file
from raftune.store.parquet import read_table
from raftune.store.run import RunFolder

GENERATED = ("sample_id", "prompt_id", "k", "seed", "completion", "completion_ids", "invalid")
# The folder of scores, the section of the configuration that names its rewards, and what its score is called here.
SCORED = {"reward": ("score", "rewards"), "held_out": ("judge", "evaluation")}


@dataclass(frozen=True)
class ComparedRun:
    """The held-out samples of one round of a run; `chosen` is the word that named the round, if any."""

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
        """The chunks whose files the commits of all stages list, also if such a file is lost."""
        names = ["generate", *(SCORED[name][0] for name in self.scored)]
        commits = [self.run.commit(self.round, f"evaluate/{name}") for name in names]
        files = [{name for name in commit.files if name.endswith(".parquet")} for commit in commits if commit]
        return sorted(int(Path(name).stem.removeprefix("chunk-")) for name in set.intersection(*files))

    @property
    def scored(self) -> list[str]:
        return ["reward", *(["held_out"] if self.run.was_made(self.round, "evaluate/judge") else [])]

    @cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The prompts by id, with their columns."""
        return {prompt.id: prompt for chunk in self.chunks for prompt in read_prompts(self.folder / "plan", chunk)}

    @cached_property
    def samples(self) -> pa.Table:
        """One row a sample: prompt_id, k, seed, completion and, where there are any, completion_ids."""
        return pa.concat_tables(
            read_table(self.folder / "generate" / chunk_file(chunk), GENERATED) for chunk in self.chunks
        )

    @cached_property
    def keys(self) -> dict[tuple[str, int, int | None], int]:
        """The row of each sample by its prompt, number and seed."""
        columns = (self.samples.column(name).to_pylist() for name in ("prompt_id", "k", "seed"))
        return {key: row for row, key in enumerate(zip(*columns, strict=True))}

    @cached_property
    def scores(self) -> dict[str, FloatArray]:
        """(N,) `reward`, `reward/NAME`, `held_out`, `held_out/NAME`, in the order of samples; NaN where it failed."""
        scores: dict[str, FloatArray] = {}
        for name in self.scored:
            tables = [read_table(self.folder / SCORED[name][0] / chunk_file(chunk)) for chunk in self.chunks]
            table = pa.concat_tables(tables, promote_options="default")  # not every chunk has each logged column
            columns = {name: ("score", "status")}
            for column in table.column_names:
                if column.startswith("rewards/"):
                    part = column.removeprefix("rewards/")
                    columns[f"{name}/{part}"] = (column, f"status/{part}")
            for key, (column, status) in columns.items():
                scores[key] = usable(table, column, status)
        return scores

    def parts(self, name: str) -> list[str]:
        """The names of the rewards whose sum this score is."""
        return [key.removeprefix(f"{name}/") for key in self.scores if key.startswith(f"{name}/")]

    @property
    def words(self) -> str:
        """A description of the side for a person."""
        if not self.config.get("num_rounds"):  # an evaluation: its model matters
            model = self.config["policy"].get("model")
            return f"{self.run.root}, an evaluation" + (f" of {model}" if model else "")
        round_ = "the start" if self.round == 0 else f"round {self.round}"
        return f"{self.run.root}, {round_}{' (the best)' if self.chosen == 'best' else ''}"


def choose(reference: str, letter: str) -> ComparedRun:
    """The side that `RUN`, `RUN@3`, `RUN@best`, `RUN@last` or `RUN@start` names. Raises ConfigError, StoreError.

    Without a round it is the best one, or the only one that was evaluated.
    """
    path, at, label = reference.rpartition("@")
    if not at or Path(reference).is_dir() or "/" in label:  # an @ in the folder's own name
        path, label = reference, ""
    run = RunFolder(path)
    run.read_config()
    evaluated = run.rounds_with("evaluate/score")
    resume = shell_command("raftune", "resume", run.root)
    if not evaluated:
        raise StoreError(
            f"{letter}: {path} holds no evaluation yet. `{shell_command('raftune', 'evaluate', path)}` makes one, "
            f"`{resume}` goes on with a run."
        )
    if at and path != reference and not label.isdecimal() and label not in ("best", "last", "start"):
        near = difflib.get_close_matches(label, ["best", "last", "start"], n=1)
        hint = f"Did you mean {path}@{near[0]}?" if near else f"Write {path}@{evaluated[-1]}, for example."
        raise ConfigError(f"{letter}: a round is a number, best, last or start; got {label!r}. {hint}")
    if label.isdecimal():
        round_, label = int(label), ""
    elif label in ("start", "last"):
        round_ = 0 if label == "start" else evaluated[-1]
    elif not label and len(evaluated) == 1:
        round_ = evaluated[0]
    else:
        best, label = best_round(run.root), "best"
        if best is None:
            raise StoreError(
                f"{letter}: {run.root} has no best round yet. Name one, such as {run.root}@{evaluated[-1]}, or go on "
                f"with `{resume}`."
            )
        round_ = best
    if round_ not in evaluated:
        raise ConfigError(
            f"{letter}: round {round_} of {path} was not evaluated; there are {span(evaluated)}. Choose one."
        )
    return ComparedRun(run, round_, label)


@dataclass(frozen=True)
class SamplePairs:
    """Row a[i] of A and row b[i] of B have the same prompt, prompts[groups[i]], and seed."""

    side_a: ComparedRun
    side_b: ComparedRun
    keys: list[tuple[str, int, int | None]]  # prompt id, number and seed of each pair
    a: IntArray
    b: IntArray
    groups: IntArray
    prompts: list[Prompt]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def answers(self) -> tuple[list[Any], list[Any]]:
        """A's and B's completions, pair by pair."""
        a, b = (side.samples.column("completion") for side in (self.side_a, self.side_b))
        return a.take(pa.array(self.a)).to_pylist(), b.take(pa.array(self.b)).to_pylist()

    @property
    def are_images(self) -> bool:
        return any(kinds.is_binary(side.samples.schema.field("completion").type) for side in (self.side_a, self.side_b))

    @property
    def prompt_of_each(self) -> list[Prompt]:
        """(N,) the prompt of each pair."""
        return [self.prompts[group] for group in self.groups]


def pair(side_a: ComparedRun, side_b: ComparedRun) -> SamplePairs:
    """The pairs in A's order. Raises ConfigError where A and B are the same, DataError where they share nothing."""
    if (side_a.run.root.resolve(), side_a.round) == (side_b.run.root.resolve(), side_b.round):
        best = " (the start is its best round)" if side_a.round == 0 else ""
        raise ConfigError(
            f"A and B must differ; both are {side_a.words}{best}. Name two rounds, such as {side_a.run.root}@1 and "
            f"{side_a.run.root}@start, or two runs."
        )
    keys = [key for key in side_a.keys if key in side_b.keys]
    common = len(side_a.prompts.keys() & side_b.prompts.keys())
    if not keys and not common:
        raise DataError(
            f"A and B have no prompt in common: {len(side_a.prompts)} in A, {len(side_b.prompts)} in B. Evaluate both "
            "on the same prompts: raftune evaluate … --evaluation.prompts FILE."
        )
    if not keys:
        seeds = [side.plan["seed"][-1] for side in (side_a, side_b)]
        raise DataError(
            f"A and B share {counted(common, 'prompt')}, and no seed: evaluation.seed is {seeds[0]} in A and "
            f"{seeds[1]} in B. Evaluate one of them again: raftune evaluate … --evaluation.seed {seeds[1]}."
        )
    numbers = {name: number for number, name in enumerate(dict.fromkeys(key[0] for key in keys))}
    rows_a, rows_b = (np.array([side.keys[key] for key in keys], dtype=np.int64) for side in (side_a, side_b))
    groups = np.array([numbers[key[0]] for key in keys], dtype=np.int64)
    return SamplePairs(side_a, side_b, keys, rows_a, rows_b, groups, [side_a.prompts[name] for name in numbers])


def differences(pairs: SamplePairs) -> Iterator[str]:
    """How A and B differ in prompts, number of completions, sampling options and columns, a line each, with counts."""
    sides = (pairs.side_a, pairs.side_b)
    a, b = (side.prompts for side in sides)
    if a.keys() != b.keys():
        only = [len(a.keys() - b.keys()), len(b.keys() - a.keys())]
        yield f"prompts: {len(pairs.prompts)} in common are compared; {only[0]} are in A alone, {only[1]} in B alone"
    counts = [int(side.plan["num_generations"]) for side in sides]
    if counts[0] != counts[1]:
        yield f"completions: {counts[0]} a prompt in A, {counts[1]} in B; the first {min(counts)} of each are compared"
    commits = [side.run.commit(side.round, "evaluate/generate") for side in sides]
    options = [commit.fields if commit is not None else {} for commit in commits]
    for name in sorted(options[0].keys() | options[1].keys()):
        values = [fields.get(name) for fields in options]
        if name.startswith("sampling.") and values[0] != values[1]:
            texts = [text if len(text) <= 40 else text[:39] + "…" for text in map(repr, values)]
            yield f"{name}: {texts[0]} in A, {texts[1]} in B"
    other = sum(prompt.columns != b[prompt.id].columns for prompt in pairs.prompts)
    if other:
        yield f"columns: of {other} prompts other than the prompt's text differ; A's go to the rewards that score now"
