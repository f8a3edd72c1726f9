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
from raftune.results.round_metrics import SampleStats
from raftune.sanitize import first_line
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
        drawn = SampleStats(self.run, round_)
        self.tokens += drawn.tokens
        logged = drawn.metrics() | held_out(metrics)
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
                f"report_to: {name} could not be started: {first_line(error)}. Fix it, or leave it out of report_to."
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
