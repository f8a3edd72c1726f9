"""History of rounds: which is best, and whether to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raftune.config.run import RunConfig, StopConfig
from raftune.errors import ConfigError
from raftune.results.summary import Metrics, alarms_of, read_json
from raftune.stages.train import NOTHING, REPORT
from raftune.store.commit import with_hash
from raftune.store.files import json_bytes, write_json
from raftune.store.run import RunFolder


@dataclass(frozen=True)
class RoundRecord:
    """A finished round: its metrics (empty without evaluation), alarms, and summary of the selection.

    `nothing_learned` is why the round had nothing to train on and kept the policy; empty where it trained.
    """

    metrics: Metrics
    alarms: list[dict[str, Any]]
    selection: dict[str, Any]
    nothing_learned: str


@dataclass(frozen=True)
class RunOutcome:
    """Where a run ended: rounds done, the round whose model is published, its value, and why it stopped.

    `prompts` are those that the value is the mean of.
    """

    rounds: int
    best: int
    value: float | None
    reason: str = ""
    prompts: int | None = None


def read_round(run: RunFolder, round_: int, guards: bool = True) -> RoundRecord:
    """The record of a round whose stages are committed."""
    alarms = alarms_of(run, round_) if guards else []
    selection = read_json(run.folder(round_, "select") / "summary.json")
    return RoundRecord(metrics_of(run, round_), alarms, selection, nothing_learned(run, round_) if round_ else "")


def metrics_of(run: RunFolder, round_: int) -> Metrics:
    """The round's committed metrics; empty where evaluation is off."""
    return read_json(run.folder(round_, "evaluate") / "metrics.json")


def nothing_learned(run: RunFolder, round_: int) -> str:
    """Why the round had nothing to train on and kept the policy; empty where it trained."""
    report = read_json(run.folder(round_, "model") / REPORT)
    return str(report.get("details", {}).get(NOTHING, ""))


def best(config: RunConfig, history: Sequence[Metrics]) -> RunOutcome:
    """The best round by the held-out value, or the last one where nothing was measured; history[0] is the start."""
    last, by = len(history) - 1, config.evaluation.best_by
    if (highest := best_round(history, by)) is None:
        return RunOutcome(last, last, None)
    return RunOutcome(last, *highest, prompts=(compared_by(history[highest[0]], by) or {}).get("n"))


def write_best(run: RunFolder, config: RunConfig, outcome: RunOutcome) -> None:
    """Writes best.json unless it is there with this content."""
    path, content = run.root / "best.json", with_hash(best_json(config, outcome))
    if not path.is_file() or path.read_bytes() != json_bytes(content):
        write_json(run.tmp, path, content)


def best_json(config: RunConfig, outcome: RunOutcome) -> dict[str, Any]:
    """The content of best.json."""
    return {
        "round": outcome.best,
        "by": config.evaluation.best_by if outcome.value is not None else "last round",
        "value": outcome.value,
        "prompts": outcome.prompts,
        "model": f"round-{outcome.best:04d}/model",
        "rounds": outcome.rounds,
    }


def compared_by(metrics: Metrics, best_by: str) -> Mapping[str, Any] | None:
    """The interval whose mean rounds are compared by: 'reward', 'held_out', or one reward's name.

    Raises ConfigError for a name that no reward has.
    """
    for name in (best_by, f"held_out/rewards/{best_by}/mean", f"rewards/{best_by}/mean"):
        if name in metrics:
            return metrics[name]  # type: ignore[no-any-return]
    names = [n.removesuffix("/mean").split("rewards/")[-1] for n in metrics if n.endswith("/mean") and "rewards/" in n]
    raise ConfigError(
        f"evaluation.best_by must name 'reward' or one of the rewards ({', '.join(names)}); "
        f"got {best_by!r}. Choose one."
    )


def values_of(history: Sequence[Metrics], best_by: str) -> list[float]:
    """The mean that rounds are compared by, of each round; -inf where it was not measured."""
    intervals = [compared_by(metrics, best_by) if metrics else None for metrics in history]
    return [-math.inf if value is None else float(value["mean"]) for value in intervals]


def best_round(history: Sequence[Metrics], best_by: str) -> tuple[int, float] | None:
    """The round (0 is the start) of the highest value, the earliest of equals; None where none was measured."""
    values = values_of(history, best_by)
    highest = max(values, default=-math.inf)
    return None if highest == -math.inf else (values.index(highest), highest)


def should_stop(config: RunConfig, rounds: Sequence[RoundRecord]) -> str | None:
    """Why to end after the last of these rounds; None to continue. rounds[0] is the initial model."""
    nothing = [record.nothing_learned for record in rounds[1:]]
    idle = next((i for i, why in enumerate(reversed(nothing)) if not why), len(nothing))
    if config.stop.empty_rounds is not None and idle >= config.stop.empty_rounds:
        in_a_row = "1 round had" if idle == 1 else f"{idle} rounds in a row had"
        return f"{in_a_row} nothing to learn from (stop.empty_rounds = {config.stop.empty_rounds}): {nothing[-1]}"
    if reason := reason_to_stop([record.metrics for record in rounds], config.stop, config.evaluation.best_by):
        return reason
    for alarm in rounds[-1].alarms:
        if alarm["alarm"] in config.guards.stop_on:
            return f"round {alarm['round']} raised {alarm['alarm']} (guards.stop_on): {alarm['evidence']}"
    return None


def reason_to_stop(history: Sequence[Metrics], stop: StopConfig, best_by: str) -> str | None:
    """Why the metrics of these rounds end the run, in words; None to continue. history[0] is the start."""
    last = history[-1]
    if not last:
        return None
    kl = last.get("kl")
    if stop.max_kl is not None and kl is not None and kl["mean"] > stop.max_kl:
        return f"the KL to the start is {kl['mean']:.2f} nats, above stop.max_kl = {stop.max_kl:g}"
    if stop.max_falls is not None:
        falls = 0  # of the latest rounds without a break: held-out reward lower, trained reward higher than before
        for before, after in zip(history[-2::-1], history[:0:-1], strict=True):
            values = [metrics.get(name) for metrics in (before, after) for name in ("reward", "held_out")]
            means = [value["mean"] for value in values if value is not None]
            if len(means) < 4 or not (means[2] > means[0] and means[3] < means[1]):
                break
            falls += 1
        if falls >= stop.max_falls:
            parting = "the held-out reward fell while the trained one rose"
            return f"{parting} for {falls} rounds (stop.max_falls = {stop.max_falls})"
    if stop.patience is not None:
        highest, idle = -math.inf, 0
        for value in values_of(history, best_by):
            idle = 0 if value > highest + stop.min_gain else idle + 1
            highest = value if not idle else highest
        if idle >= stop.patience:
            return f"no gain above {stop.min_gain:g} for {idle} rounds (stop.patience = {stop.patience})"
    return None
