"""Summary of a run: one row of numbers for each round, and the metrics of an evaluation in words."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raftune.config.evaluation import FEWEST_UNITS
from raftune.errors import RunDamaged
from raftune.records import Row
from raftune.sanitize import counted, duration, percent
from raftune.store import committed
from raftune.store.commit import has_changed
from raftune.store.committed import check_file, is_listed
from raftune.store.run import RunFolder

Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A number of metrics.json: how it is named, explained and written, and its key in a row of the summary, if any."""

    title: str
    meaning: str
    write: Callable[[float], str] = "{:.3f}".format
    key: str = ""


two_digits, integer = "{:.2f}".format, "{:,.0f}".format
per_cent = partial(percent, digits=1)
# By the name in metrics.json, in the order of tables. The parts of a score follow it.
MEASURES = {
    "reward": Measure("reward", "the mean over held-out prompts", key="reward"),
    "held_out": Measure("held out", "a reward that is never trained on", key="held_out"),
    "frac_reward_zero_std": Measure("no spread", "share of prompts whose completions all score the same"),
    "kl": Measure("KL", "to the start model, nats of a completion", two_digits, "kl"),
    "kl_per_token": Measure("  per token", "nats of a token"),
    "entropy": Measure("entropy", "nats of a completion: how undecided the policy is", two_digits),
    "entropy_per_token": Measure("  per token", "nats of a token"),
    "perplexity": Measure("perplexity", "of the reference completions: lower is likelier", two_digits, "perplexity"),
    "completions/mean_length": Measure("length", "tokens of a completion, on average", "{:.1f}".format, "length"),
    "completions/clipped_ratio": Measure(
        "cut off", "share of completions that reached max_completion_length", key="clipped"
    ),
    "distinct_1": Measure("distinct-1", "different words over all words"),
    "distinct_2": Measure("distinct-2", "different word pairs over all word pairs", key="distinct_2"),
    "unique_1": Measure("unique-1", "words that occur once in all completions", integer),
    "unique_2": Measure("unique-2", "word pairs that occur once in all completions", integer),
    "msttr_100": Measure("MSTTR", "different words in a hundred, on average (MSTTR-100)", key="msttr"),
    "similarity": Measure("similarity", "of two completions to one prompt: 1 where they are the same"),
    "brightness": Measure("brightness", "mean luma of an image: 0 black, 1 white"),
    "saturation": Measure("saturation", "mean saturation of an image: 0 grey, 1 pure colours", key="saturation"),
    "contrast": Measure("contrast", "standard deviation of an image's luma, at most 0.5", key="contrast"),
    "saturated_ratio": Measure("burnt out", "share of pixels with a channel at its darkest or brightest"),
    "pixel_distance": Measure(
        "pixels", "distance of two images of one prompt, by their thumbnails: 0 where the same", key="pixel_distance"
    ),
    "near_duplicates": Measure("duplicates", "share of images that nearly repeat another"),
    "feature_distance": Measure("distance", "of two images of one prompt: the mean of 1 - cos of their features"),
    "vendi": Measure("Vendi", "how many different images of a prompt there are in effect", two_digits, "vendi"),
    "feature_drift": Measure("drift", "1 - cos of features to the start's image of the same seed", key="drift"),
    "invalid_ratio": Measure("invalid", "share of samples that are no image, or flagged", per_cent, "invalid"),
}
INTERVALS = ("reward", "held_out", "kl", "length")  # keys of a row beside which the ends of the interval stand
OWN = "metrics/"  # how the names of custom metrics begin
FIX = "`raftune verify` lists what is damaged, and `raftune resume --from STAGE` makes it again."
AGAIN = "`raftune resume` writes it again."
# Columns that are shown where a round has more than this.
WORTH_SAYING: dict[str, Callable[[Row], float]] = {
    "nothing_to_rank": lambda row: 0.05 * row.get("prompts", 0),
    "clipped_kept": lambda row: 0.05,
}
SAME = "all their candidates score the same"
LONGEST_TITLE = 12  # letters, so that the table of a whole run fits beside an image of it


@dataclass(frozen=True)
class SummaryColumn:
    """One column of the table by round: its title, what it says, and how a row's number is written."""

    key: str
    title: str
    meaning: str
    write: Callable[[Row], str]


def rows_of(root: str | Path) -> list[Row]:
    """One row for each round that was evaluated, or trained where evaluation is off; round 0 is the start.

    Raises RunDamaged for numbers that are none.
    """
    run = RunFolder(root)
    seconds = seconds_by_round(run.events)
    return [read_row(run, round_, seconds.get(round_)) for round_ in run.rounds() if is_done(run, round_)]


def is_done(run: RunFolder, round_: int) -> bool:
    """Whether the round was evaluated, or trained where evaluation is off."""
    return run.is_committed(round_, "evaluate") or run.is_committed(round_, "model")


def read_row(run: RunFolder, round_: int, seconds: float | None = None) -> Row:
    """The numbers of one round, read from what it committed. Raises RunDamaged for numbers that are none."""
    metrics = read_json(run.folder(round_, "evaluate") / "metrics.json")
    summary = read_json(run.folder(round_, "select") / "summary.json")
    try:
        return row_of(round_, metrics, summary, seconds)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = run.folder(round_, "evaluate") / "metrics.json"
        raise RunDamaged(f"{path} does not hold the numbers of an evaluation. {FIX}") from error


def row_of(round_: int, metrics: Mapping[str, Any], summary: Mapping[str, Any], seconds: float | None) -> Row:
    """The numbers of one round; what was not measured is left out."""
    row: Row = {"round": round_}
    custom = [(name, name) for name in metrics if name.startswith(OWN)]
    for name, key in [*((name, measure.key) for name, measure in MEASURES.items() if measure.key), *custom]:
        value = metrics.get(name)
        if key in INTERVALS and value:
            row |= {key: value["mean"], **({f"{key}_n": value["n"]} if "n" in value else {})}
            if ends := ends_of(value):
                row |= {f"{key}_low": ends[0], f"{key}_high": ends[1]}
        elif (mean := value.get("mean") if isinstance(value, Mapping) else value) is not None:
            row[key] = mean
    if curve := {int(k): value for k, value in (metrics.get("best_of_k") or {}).items() if value}:
        row |= {"best_of_k": curve[max(curve)]["mean"], "k": max(curve)}
    for key in ("samples", "kept", "prompts", "nothing_to_rank", "clipped_kept", "reward_generated", "reward_kept"):
        if summary.get(key) is not None:
            row[key] = summary[key]
    if seconds is not None:
        row["seconds"] = round(seconds, 2)
    return row


def ends_of(interval: Mapping[str, Any]) -> tuple[float, float] | None:
    """The ends of a mean's 95 % interval; None of one without, also of one that stands on fewer than FEWEST_UNITS."""
    if interval.get("low") is None or interval.get("high") is None or interval.get("n", FEWEST_UNITS) < FEWEST_UNITS:
        return None
    return interval["low"], interval["high"]


def columns_for(rows: Iterable[Row], held_out: Sequence[str] = ()) -> list[SummaryColumn]:
    """The columns that any of the rows has a number for; `held_out` are the names of the held-out rewards."""
    rows = list(rows)
    ks = [row["k"] for row in rows if "k" in row]
    judge = held_out[0] if len(held_out) == 1 and len(held_out[0]) <= LONGEST_TITLE else "held out"
    counts = sorted({row["reward_n"] for row in rows if "reward_n" in row})
    chunks = f" (n={' to '.join(map(str, (counts[0], counts[-1])[: len(counts)]))})" if counts else ""
    wide = any("reward_low" in row for row in rows) or not counts
    half = ", with the half width of its 95 % interval" if wide else f"; fewer than {FEWEST_UNITS} give no interval"
    best_of = "the reward of the best of so many samples: the headroom"
    columns = [
        SummaryColumn("round", "round", "0 is the start", lambda row: str(row["round"] or "start")),
        SummaryColumn("reward", f"reward{chunks}", f"mean on held-out prompts{half}", with_interval),
        number("best_of_k", f"best of {max(ks, default=0)}", best_of),
        number("held_out", judge, "held out: a reward that is never trained on"),
    ]
    for measure in MEASURES.values():
        if measure.key not in ("", "reward", "held_out", "clipped"):
            columns.append(number(measure.key, measure.title, measure.meaning, measure.write))
    for key in sorted({key for row in rows for key in row if key.startswith(OWN)}):
        name = key.removeprefix(OWN)
        title = name if len(name) <= LONGEST_TITLE else name[: LONGEST_TITLE - 1] + "…"
        columns.append(number(key, title, f"{name}, a metric of your own", "{:.4g}".format))
    ties, kept = f"prompts with nothing to rank: {SAME}", "samples trained on, of those generated"
    columns += [
        SummaryColumn("nothing_to_rank", "ties", ties, lambda row: f"{row['nothing_to_rank']}/{row['prompts']}"),
        number("clipped_kept", "cut off", "share of the kept completions that were cut off", per_cent),
        SummaryColumn("kept", "kept", kept, lambda row: f"{row['kept']}/{row['samples']}"),
        number("seconds", "time", "of this round", duration),
    ]
    spare = {"pixel_distance"} if any("vendi" in row for row in rows) else set()  # both say how varied images are
    spare |= {key for key, worth in WORTH_SAYING.items() if all((row.get(key) or 0) <= worth(row) for row in rows)}
    return [column for column in columns if column.key not in spare and any(column.key in row for row in rows)]


def cell(column: SummaryColumn, row: Row) -> str:
    """The row's number as the column writes it; a dash where there is none."""
    return column.write(row) if row.get(column.key) is not None else "–"


def number(key: str, title: str, meaning: str, write: Callable[[float], str] = "{:.3f}".format) -> SummaryColumn:
    return SummaryColumn(key, title, meaning, lambda row: write(row[key]))


def with_interval(row: Row) -> str:
    if "reward_low" not in row:
        return f"{row['reward']:.3f}"
    return f"{row['reward']:.3f} ± {(row['reward_high'] - row['reward_low']) / 2:.3f}"


def seconds_by_round(events: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """The time that each round's stages took, over all the sessions that worked on it."""
    return {round_: sum(stages.values()) for round_, stages in seconds_by_stage(events).items()}


def seconds_by_stage(events: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The time that each stage of each round took, over all sessions, in the order in which they came.

    A session that was interrupted says how long it was at a stage; one that was killed left the times of its chunks.
    """
    total: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    chunks: list[tuple[int, str, float]] = []  # of an attempt at a stage of which no end is known yet
    for event in events:
        kind, round_, stage, seconds = (event.get(name) for name in ("event", "round", "stage", "seconds"))
        if kind == "stage_begin":
            for number, name, spent in chunks:
                total[number][name] += spent
            chunks.clear()
        elif isinstance(round_, int) and isinstance(stage, str) and isinstance(seconds, int | float):
            if not math.isfinite(seconds):
                continue
            if kind == "chunk":
                chunks.append((round_, stage, float(seconds)))
            elif kind in ("stage_end", "stage_stop"):
                total[round_][stage] += float(seconds)
                chunks.clear()
    return {round_: dict(stages) for round_, stages in total.items()}


# -- an evaluation in words ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricDescription:
    """One measure of metrics.json, in words: `name` is its key there, `interval` is empty where it has none."""

    name: str
    title: str
    value: str
    interval: str
    meaning: str


def measures(metrics: Metrics) -> Iterator[MetricDescription]:
    """Every measure that has a value, the parts of a score beneath it; what is not known here is left out."""
    for name, measure in MEASURES.items():
        prefix = {"reward": "rewards/", "held_out": "held_out/rewards/"}.get(name)
        parts = sorted(key for key in metrics if prefix and key.startswith(prefix) and key.endswith("/mean"))
        titles = {key: key.removeprefix(prefix or "").removesuffix("/mean") for key in parts}
        if (value := metrics.get(name)) is not None:
            only = f" ({titles[parts[0]]})" if len(parts) == 1 else ""
            yield describe(name, measure.title + only, value, measure.write, measure.meaning)
        for key in parts:
            if metrics[key] is not None and metrics[key] != value:
                yield describe(key, f"  {titles[key]}", metrics[key], measure.write, "a part of it")
    for key in sorted(name for name in metrics if name.startswith(OWN)):
        if metrics[key] is not None:
            yield describe(key, key.removeprefix(OWN), metrics[key], "{:.4g}".format, "a metric of your own")


def describe(name: str, title: str, value: Any, write: Callable[[float], str], meaning: str) -> MetricDescription:
    if not isinstance(value, Mapping):
        return MetricDescription(name, title, write(value), "", meaning)
    ends = ends_of(value)
    between = f"{write(ends[0])} … {write(ends[1])}" if ends else f"none, n = {value.get('n', '?')}"
    return MetricDescription(name, title, write(value["mean"]), between, meaning)


def spread(interval: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean with its 95 % interval, 1.310 [1.101, 1.519]; without one, with the number of prompts it stands on."""
    if not interval:
        return "–"
    if (ends := ends_of(interval)) is None:
        return f"{interval['mean']:.{digits}f} (n = {interval['n']}, too few for an interval)"
    return f"{interval['mean']:.{digits}f} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


@dataclass(frozen=True)
class BestOfKPoint:
    """The reward of the best of k samples, its interval in words, and the share of the largest K's gain that it has."""

    k: int
    reward: float
    interval: str
    gain: float | None


def best_of_k(metrics: Metrics, name: str = "best_of_k") -> list[BestOfKPoint]:
    """The curve, k ascending. The gain of k is its reward over that of one sample, as a share of the largest K's.

    It is None where the largest K gains nothing: then there is nothing to share.
    """
    curve = {int(k): value for k, value in (metrics.get(name) or {}).items() if value}
    if not curve:
        return []
    single, largest = curve.get(1), curve[max(curve)]["mean"]
    points = []
    for k, value in sorted(curve.items()):
        gain = None
        if single and largest > single["mean"]:
            gain = (value["mean"] - single["mean"]) / (largest - single["mean"])
        points.append(BestOfKPoint(k, value["mean"], describe("", "", value, "{:.3f}".format, "").interval, gain))
    return points


def loss_ends(losses: Sequence[float]) -> tuple[float, float]:
    """The mean loss of the first and of the last tenth of the steps: one mini-batch alone says little."""
    tenth = -(-len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def worth_of_k(curve: Sequence[BestOfKPoint]) -> str:
    """What a smaller K would give, in words: the largest k below the last, `K=4 gives 93 % of the gain of K=8`."""
    if len(curve) < 3:
        return ""
    last, before = curve[-1], curve[-2]
    if before.gain is None:
        return f"K={last.k} gains nothing over one completion: all completions to a prompt score about the same"
    return f"K={before.k} gives {percent(before.gain)} of the gain of K={last.k}"


# -- a run in words --------------------------------------------------------------------------------------------------


def selection_words(summary: Mapping[str, Any]) -> list[str]:
    """What should be said of a round's selection: how many prompts had no ranking, and kept completions cut off."""
    ties, prompts, cut = (summary.get(key) or 0 for key in ("nothing_to_rank", "prompts", "clipped_kept"))
    lines = []
    if ties > WORTH_SAYING["nothing_to_rank"](dict(summary)):
        lines.append(f"{ties} of {counted(prompts, 'prompt')} had nothing to rank: {SAME}")
    if cut > WORTH_SAYING["clipped_kept"](dict(summary)):
        lines.append(f"{percent(cut)} of the kept completions were cut off at max_completion_length")
    return lines


def done_words(num_rounds: int) -> str:
    """Why a run ended that did all it was asked for."""
    if num_rounds == 1:
        return "its one round is done"
    return f"all {num_rounds} rounds are done" if num_rounds else "the start is judged"


def overlap_words(overlap: int, held_out: int) -> str:
    """A warning that the policy is judged by prompts that it learned from; empty where it is not."""
    if not overlap:
        return ""
    return f"{overlap} of {held_out} held-out prompts are also trained on: what is measured on them flatters the policy"


def alarms_of(run: RunFolder, round_: int) -> list[dict[str, Any]]:
    """What the round's guard says a person should look at; empty where there is no guard, or nothing to say.

    Raises RunDamaged for a file that holds no alarms.
    """

    def has_texts(value: Any, *keys: str) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in keys)

    path = run.folder(round_, "guard") / "alarms.json"
    alarms: Any = committed.read_json(path) if path.is_file() or is_listed(path) else []
    for alarm in alarms if isinstance(alarms, list) else [{}]:
        samples = alarm.get("samples") if has_texts(alarm, "alarm", "title", "evidence") else None
        if not isinstance(samples, list) or not all(has_texts(sample, "sample_id", "why") for sample in samples):
            raise RunDamaged(f"{path} does not hold a list of alarms. {FIX}")
    return list(alarms)


def best_round(root: Path) -> int | None:
    """The round that the run published as its best; None before there is one. Raises RunDamaged."""
    path, run = root / "best.json", RunFolder(root)
    if not path.is_file() and sum(is_done(run, round_) for round_ in run.rounds()) > 1:
        raise RunDamaged(f"{path} is missing. {AGAIN}")
    content = read_json(path)
    if content and has_changed(content, "rounds"):
        raise RunDamaged(f"{path} has changed since it was written. {AGAIN}")
    round_ = content.get("round")
    if isinstance(round_, bool) or not isinstance(round_, int | None):
        raise RunDamaged(f"{path} must name a round by its number; it holds {round_!r}. {AGAIN}")
    return round_


def overlap_warning(root: Path) -> str:
    """The same of a run whose prompts are read: empty where there is nothing to warn of."""
    notes = read_json(root / "round-0000" / "data" / "notes.json")
    return overlap_words(int(notes.get("overlap", 0)), int(notes.get("held_out", 0)))


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is no such file. Raises RunDamaged for what is no object, or was changed."""
    if not path.is_file() and not is_listed(path):
        return {}
    try:
        content = json.loads(check_file(path).read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):  # best.json follows from the rounds, and all else has a hash of its own
        raise RunDamaged(f"{path} is not a JSON object. {AGAIN if path.name == 'best.json' else FIX}")
    return content
