"""Logs each round's metrics to TensorBoard, Weights & Biases, MLflow and other accelerate trackers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raftune.arrays import FloatArray
from raftune.config.run import RunConfig
from raftune.config.secrets import redacted
from raftune.errors import ConfigError
from raftune.protocols import Callback
from raftune.sanitize import first_line
from raftune.stages.score import logged_metrics
from raftune.store.layout import chunk_file, chunk_numbers
from raftune.store.parquet import column_names, read_table
from raftune.store.run import RunFolder

PROJECT = "raftune"
# What each tracker is told besides the project's name; those that write files put them into the run.
KEYWORDS: dict[str, tuple[str, ...]] = {"wandb": ("name",), "mlflow": ("run_name",), "trackio": ("name",)}


@contextlib.contextmanager
def reporting(config: RunConfig, root: Path, observe: Callback) -> Iterator[Callback]:
    """An observer that also tells every tracker of `report_to`; none of them is started where nothing is left to do.

    A tracker begun by a resumed run gets the rounds before it as well, so that each holds the whole history. The step
    is the round. Raises ConfigError for a tracker that is unknown, not installed, or cannot start.
    """
    names = wanted(config.report_to)
    check_installed(names)
    if not names:
        yield observe
        return
    reporter = TrackerCallback(config, root, names)

    def both(kind: str, facts: dict[str, Any]) -> None:
        reporter(kind, facts)
        observe(kind, facts)

    try:
        yield both
    finally:
        reporter.close()


class TrackerCallback:
    """Logs each round's numbers under TRL's names."""

    def __init__(self, config: RunConfig, root: Path, names: Sequence[str]) -> None:
        self.config, self.run, self.names = config, RunFolder(root), names
        self.trackers: list[Any] | None = None
        self.waiting: list[tuple[int, dict[str, float]]] = []
        self.seconds: dict[int, float] = {}
        self.tokens = 0

    def __call__(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "stage_begin" and self.trackers is None:
            self.trackers = [self._start(name) for name in self.names]
        elif kind == "stage_end":
            self.seconds[facts["round"]] = self.seconds.get(facts["round"], 0.0) + facts["seconds"]
        elif kind == "round_end":
            self._round_end(facts["round"], facts["metrics"], facts["summary"], facts["alarms"])

    def _round_end(
        self, round_: int, metrics: Mapping[str, Any], summary: Mapping[str, Any], alarms: Sequence[Any]
    ) -> None:
        drawn = TrackerSampleStats.of(self.run, round_)
        self.tokens += drawn.tokens
        logged = logged_metrics(self.run.folder(round_, "score")) | drawn.numbers() | held_out(metrics)
        if summary.get("reward_kept") is not None:
            logged |= {"reward_kept": summary["reward_kept"], "kept_fraction": summary["kept"] / summary["samples"]}
        if round_ and self.config.guards.enabled:
            logged["alarms"] = float(len(alarms))
        if self.tokens:
            logged["num_completion_tokens"] = float(self.tokens)
        if round_ in self.seconds:
            logged["round_time"] = self.seconds[round_]
        self.waiting.append((round_, logged))
        if self.trackers is not None:
            for tracker in [*self.trackers]:
                self._log(tracker)
            self.waiting.clear()

    def _log(self, tracker: Any) -> None:
        """A tracker that fails, such as one whose server is gone, is left out from then on: the run goes on."""
        assert self.trackers is not None
        try:
            for step, values in self.waiting:
                tracker.log(values, step=step)
        except Exception as error:
            self.trackers.remove(tracker)
            warnings.warn(f"report_to: {tracker.name} failed and is left out from now on: {error}", stacklevel=2)

    def _start(self, name: str) -> Any:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the trackers write a log that asks which process this is
        kind = LOGGER_TYPE_TO_CLASS[name]
        keywords: dict[str, Any] = dict.fromkeys(KEYWORDS.get(name, ()), self.config.name)
        if kind.requires_logging_directory:
            keywords["logging_dir"] = str(self.run.root)
        try:
            tracker = kind(name if kind.requires_logging_directory else PROJECT, **keywords)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(flat(redacted(self.config.model_dump(mode="json"))))
        except Exception as error:
            raise ConfigError(
                f"report_to: {name} could not be started: {first_line(error)}. Mend it, or leave it out of report_to."
            ) from error
        return tracker

    def close(self) -> None:
        for tracker in self.trackers or ():
            with contextlib.suppress(Exception):
                tracker.finish()


def wanted(report_to: Sequence[str]) -> tuple[str, ...]:
    """The trackers that are meant: `none` is no tracker, `all` is every one that is installed."""
    if "all" in report_to:
        from accelerate.tracking import get_available_trackers

        return tuple(str(name) for name in get_available_trackers())
    return tuple(dict.fromkeys(name for name in report_to if name != "none"))


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(map(str, LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"report_to must name trackers; got {name!r}. There are {known}.")
        if name in {str(kind) for kind in LoggerType} and name not in installed:
            package = name.replace("_", "-")
            raise ConfigError(
                f"report_to names {name!r}, which is not installed. `pip install {package}`, or leave it out."
            )


@dataclass
class TrackerSampleStats:
    """What a round generated, summed up chunk by chunk: the policy's own samples, without a teacher's and without
    columns.
    """

    values: dict[str, list[FloatArray]] = field(default_factory=dict)
    spreads: list[float] = field(default_factory=list)
    tokens: int = 0

    @classmethod
    def of(cls, run: RunFolder, round_: int) -> TrackerSampleStats:
        drawn = cls()
        for chunk in chunk_numbers(run.folder(round_, "score")):
            drawn.add_scores(own(read_table(run.folder(round_, "score") / chunk_file(chunk))))
            drawn.add_texts(run.folder(round_, "generate") / chunk_file(chunk))
        return drawn

    def add_scores(self, table: pa.Table) -> None:
        ok = pc.equal(table.column("status"), "ok")
        scores = pc.if_else(ok, table.column("score"), None).to_numpy(zero_copy_only=False).astype(np.float64)
        self.values.setdefault("reward", []).append(scores)
        for name in table.column_names:
            if name.startswith("rewards/"):
                column = table.column(name).to_numpy(zero_copy_only=False).astype(np.float64)
                self.values.setdefault(name, []).append(column)
        groups = np.unique(np.array(table.column("prompt_id").to_pylist(), dtype=str), return_inverse=True)[1]
        for group in range(int(groups.max(initial=-1)) + 1):
            found = scores[(groups == group) & np.isfinite(scores)]
            self.spreads += [float(np.ptp(found))] if len(found) else []

    def add_texts(self, path: Path) -> None:
        if "completion_ids" not in column_names(path):
            return
        table = own(read_table(path, ["source", "completion_ids", "finish"]))
        lengths = pc.list_value_length(table.column("completion_ids")).to_numpy(zero_copy_only=False)
        cut = pc.equal(table.column("finish"), "length").to_numpy(zero_copy_only=False)
        self.tokens += int(lengths.sum())
        self.values.setdefault("completions/mean_length", []).append(lengths.astype(np.float64))
        self.values.setdefault("completions/clipped_ratio", []).append(cut.astype(np.float64))

    def numbers(self) -> dict[str, float]:
        """Under TRL's names: `reward`, `reward_std`, `rewards/NAME/mean`, `completions/mean_length`, …"""
        found: dict[str, float] = {}
        for name, parts in self.values.items():
            values = np.concatenate(parts)
            values = values[np.isfinite(values)]
            if len(values):
                found[f"{name}/mean" if name.startswith("rewards/") else name] = float(values.mean())
            if len(values) and name.startswith("reward"):
                found["reward_std" if name == "reward" else f"{name}/std"] = float(values.std())
        if self.spreads:
            found["frac_reward_zero_std"] = float(np.mean([spread == 0 for spread in self.spreads]))
        return found


def own(table: pa.Table) -> pa.Table:
    """The policy's own samples."""
    return table.filter(pc.equal(table.column("source"), "policy"))


def held_out(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The round's evaluation, flat: `eval_reward`, `eval_rewards/NAME/mean`, `eval_kl`, `eval_best_of_k`, ….

    What was not measured is left out.
    """
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if name.endswith("best_of_k"):
            value = value[max(value, key=int)] if value else None
        found[f"eval_{name}"] = value.get("mean") if isinstance(value, Mapping) else value
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """The configuration as dotted scalars; lists as text, what is None left out."""
    found: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found
