"""Logs each round's metrics to TensorBoard, Weights & Biases, MLflow and other accelerate trackers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raftune.config.run import RunConfig
from raftune.config.secrets import redacted
from raftune.errors import ConfigError
from raftune.protocols import Callback
from raftune.results.round_metrics import sample_stats
from raftune.sanitize import first_line
from raftune.store.run import RunFolder

PROJECT = "raftune"
# The argument that gets the run's name; trackers that write files write them into the run.
NAMED_BY = {"wandb": "name", "mlflow": "run_name", "trackio": "name"}


@contextlib.contextmanager
def reporting(config: RunConfig, root: Path, observe: Callback) -> Iterator[Callback]:
    """An observer that also logs to every tracker of `report_to`; none is started where nothing is left to do.

    A tracker started by a resumed run also gets the rounds before it, so that each has the whole history. The step is
    the round. Raises ConfigError for a tracker that is unknown, not installed, or cannot start.
    """
    names = wanted(config.report_to)
    check_installed(names)
    if not names:
        yield observe
        return
    reporter = TrackerCallback(config, root, names, observe)
    try:
        yield reporter
    finally:
        for tracker in reporter.trackers or ():
            with contextlib.suppress(Exception):
                tracker.finish()


class TrackerCallback:
    """Logs each round's numbers under TRL's names, then calls `observe`."""

    def __init__(self, config: RunConfig, root: Path, names: Sequence[str], observe: Callback) -> None:
        self.config, self.run, self.names, self.observe = config, RunFolder(root), names, observe
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
            self.waiting.append((facts["round"], self._numbers(**facts)))
            for tracker in [*(self.trackers or ())]:
                self._log(tracker)
            if self.trackers is not None:
                self.waiting.clear()
        self.observe(kind, facts)

    def _numbers(
        self, round: int, metrics: Mapping[str, Any], summary: Mapping[str, Any], alarms: Sequence[Any]
    ) -> dict[str, float]:
        stats, tokens = sample_stats(self.run, round)
        self.tokens += tokens
        values: dict[str, Any] = {}
        for name, value in metrics.items():
            if name.endswith("best_of_k"):
                value = value[max(value, key=int)] if value else None
            values[f"eval_{name}"] = value.get("mean") if isinstance(value, Mapping) else value
        logged = stats | {n: float(value) for n, value in values.items() if isinstance(value, int | float)}
        if summary.get("reward_kept") is not None:
            logged |= {"reward_kept": summary["reward_kept"], "kept_fraction": summary["kept"] / summary["samples"]}
        if round and self.config.guards.enabled:
            logged["alarms"] = float(len(alarms))
        if self.tokens:
            logged["num_completion_tokens"] = float(self.tokens)
        if round in self.seconds:
            logged["round_time"] = self.seconds[round]
        return logged

    def _log(self, tracker: Any) -> None:
        """Logs the waiting rounds; a tracker that fails, such as one without its server, is dropped with a warning."""
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

        PartialState()  # the trackers' log needs the number of this process
        kind = LOGGER_TYPE_TO_CLASS[name]
        keywords: dict[str, Any] = {NAMED_BY[name]: self.config.name} if name in NAMED_BY else {}
        if kind.requires_logging_directory:
            keywords["logging_dir"] = str(self.run.root)
        try:
            tracker = kind(name if kind.requires_logging_directory else PROJECT, **keywords)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(_flat(redacted(self.config.model_dump(mode="json"))))
        except Exception as error:
            raise ConfigError(
                f"report_to: {name} could not be started: {first_line(error)}. Fix it, or leave it out of report_to."
            ) from error
        return tracker


def wanted(report_to: Sequence[str]) -> tuple[str, ...]:
    """The configured trackers: `none` is no tracker, `all` is every one that is installed."""
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
            choices = ", ".join(map(str, LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"report_to must name trackers; got {name!r}. There are {choices}.")
        if name in {str(kind) for kind in LoggerType} and name not in installed:
            package = name.replace("_", "-")
            raise ConfigError(
                f"report_to names {name!r}, which is not installed. `pip install {package}`, or leave it out."
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """The configuration as dotted scalars, lists as text, without None."""
    values: dict[str, str | int | float | bool] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            values[prefix + name] = value if isinstance(value, str | int | float | bool) else str(value)
    return values
