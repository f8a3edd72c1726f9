"""History of rounds: which is best, and whether to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raftune.config.run import RunConfig, StopConfig
from raftune.errors import ConfigError
from raftune.results.measures import Metrics
from raftune.results.summary import alarms_of, read_json
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
    return RoundRecord(
        metrics=metrics_of(run, round_),
        alarms=alarms_of(run, round_) if guards else [],
        selection=read_json(run.folder(round_, "select") / "summary.json"),
        nothing_learned=nothing_learned(run, round_) if round_ else "",
    )


def metrics_of(run: RunFolder, round_: int) -> Metrics:
    """The round's committed metrics; empty where evaluation is off."""
    return read_json(run.folder(round_, "evaluate") / "metrics.json")


def nothing_learned(run: RunFolder, round_: int) -> str:
    """Why the round had nothing to train on and kept the policy; empty where it trained."""
    report = read_json(run.folder(round_, "model") / REPORT)
    return str(report.get("details", {}).get(NOTHING, ""))


def best(config: RunConfig, history: Sequence[Metrics]) -> RunOutcome:
    """The best round by the held-out value, or the last one where nothing was measured; history[0] is the start."""
    last = len(history) - 1
    round_, value = best_round(history, config.evaluation.best_by) or (last, None)
    compared = compared_by(history[round_], config.evaluation.best_by) if value is not None else None
    return RunOutcome(last, round_, value, prompts=compared.get("n") if compared else None)


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


def should_stop(config: RunConfig, rounds: Sequence[RoundRecord]) -> str | None:
    """Why to end after the last of these rounds; None to continue. rounds[0] is the initial model."""
    if reason := reason_of_emptiness([record.nothing_learned for record in rounds[1:]], config.stop):
        return reason
    reason = reason_to_stop([record.metrics for record in rounds], config.stop, config.evaluation.best_by)
    return reason or reason_of_alarm(rounds[-1].alarms, config.guards.stop_on)


def value_of(metrics: Metrics, best_by: str) -> float | None:
    """The mean that rounds are compared by: 'reward', 'held_out', or one reward's name."""
    found = compared_by(metrics, best_by)
    return None if found is None else float(found["mean"])


def compared_by(metrics: Metrics, best_by: str) -> Mapping[str, Any] | None:
    """The interval whose mean rounds are compared by. Raises ConfigError for a name that none bears."""
    for name in (best_by, f"held_out/rewards/{best_by}/mean", f"rewards/{best_by}/mean"):
        if name in metrics:
            found: Mapping[str, Any] | None = metrics[name]
            return found
    names = [n.removesuffix("/mean").split("rewards/")[-1] for n in metrics if n.endswith("/mean") and "rewards/" in n]
    raise ConfigError(
        f"evaluation.best_by must name 'reward' or one of the rewards ({', '.join(names)}); "
        f"got {best_by!r}. Choose one."
    )


def best_round(history: Sequence[Metrics], best_by: str) -> tuple[int, float] | None:
    """The round (0 is the start) of the highest value, the earliest of equals; None where none was measured."""
    values = [(value_of(metrics, best_by), number) for number, metrics in enumerate(history) if metrics]
    measured = [(value, -number) for value, number in values if value is not None]
    if not measured:
        return None
    value, number = max(measured)
    return -number, value


def reason_to_stop(history: Sequence[Metrics], stop: StopConfig, best_by: str) -> str | None:
    """Why to end after these rounds, in words; None to go on. history[0] is the start."""
    last = history[-1]
    if not last:
        return None
    kl = last.get("kl")
    if stop.max_kl is not None and kl is not None and kl["mean"] > stop.max_kl:
        return f"the KL to the start is {kl['mean']:.2f} nats, above stop.max_kl = {stop.max_kl:g}"
    if stop.max_falls is not None and (falls := rounds_of_parting(history)) >= stop.max_falls:
        parting = "the held-out reward fell while the trained one rose"
        return f"{parting} for {falls} rounds (stop.max_falls = {stop.max_falls})"
    if stop.patience is not None and (idle := rounds_without_gain(history, stop.min_gain, best_by)) >= stop.patience:
        return f"no gain above {stop.min_gain:g} for {idle} rounds (stop.patience = {stop.patience})"
    return None


def reason_of_emptiness(nothing: Sequence[str], stop: StopConfig) -> str | None:
    """Why to end after rounds that had nothing to learn from; `nothing` says why of each round, empty where it had."""
    idle = next((i for i, why in enumerate(reversed(nothing)) if not why), len(nothing))
    if stop.empty_rounds is None or idle < stop.empty_rounds:
        return None
    rounds = "1 round had" if idle == 1 else f"{idle} rounds in a row had"
    return f"{rounds} nothing to learn from (stop.empty_rounds = {stop.empty_rounds}): {nothing[-1]}"


def reason_of_alarm(alarms: Sequence[Mapping[str, Any]], stop_on: Sequence[str]) -> str | None:
    """Why to end after a round that raised these alarms: the first of them that the run is to stop on."""
    found = next((alarm for alarm in alarms if alarm["alarm"] in stop_on), None)
    if found is None:
        return None
    return f"round {found['round']} raised {found['alarm']} (guards.stop_on): {found['evidence']}"


def rounds_of_parting(history: Sequence[Metrics]) -> int:
    """How many of the latest rounds, without a break, lowered the held-out reward while they raised the trained one."""
    count = 0
    for before, after in zip(history[-2::-1], history[:0:-1], strict=True):
        found = [m.get(name) for m in (before, after) for name in ("reward", "held_out")]
        values = [value["mean"] for value in found if value is not None]
        if len(values) < 4:
            break
        trained, held_out, trained_after, held_out_after = values
        if not (trained_after > trained and held_out_after < held_out):
            break
        count += 1
    return count


def gain(before: Metrics, after: Metrics, name: str) -> float | None:
    """By how much a mean rose; None where either round did not measure it."""
    old, new = before.get(name), after.get(name)
    return None if old is None or new is None else float(new["mean"] - old["mean"])


def rounds_without_gain(history: Sequence[Metrics], min_gain: float, best_by: str) -> int:
    """How many rounds have passed since the last new best."""
    best, since = float("-inf"), 0
    for metrics in history:
        value = value_of(metrics, best_by) if metrics else None
        if value is not None and value > best + min_gain:
            best, since = value, 0
        else:
            since += 1
    return since
