"""The overview of a report: summary, charts and the table by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from markupsafe import Markup

from raftune.report.charts import (
    BEST_OF,
    DIVERSITY,
    HELD_OUT,
    KL,
    LENGTH,
    OTHER,
    REWARD,
    SHAPES,
    START,
    STYLES,
    described,
    line,
    line_chart,
)
from raftune.report.charts import numbers as number_table
from raftune.report.collect import ChartPoint, Points, ReportData, best_of, by_round, curve, number
from raftune.report.page import render
from raftune.report.provenance import generation
from raftune.results.summary import cell, columns_for, seconds_by_stage
from raftune.sanitize import percent

# Of a line of a chart in overview.html: its name, its source (see `points_of`), its colour, and its meaning where the
# caption is made of the meanings of those lines that have numbers.
Line = tuple[str, ...]
COLOURS = {
    "kl": KL,
    "diversity": DIVERSITY,
    "length": LENGTH,
    "held_out": HELD_OUT,
    "best_of": BEST_OF,
    "reward": REWARD,
    "other": OTHER,
    "generate": REWARD,
    "score": HELD_OUT,
    "train": DIVERSITY,
    "evaluate": OTHER,
}
# What a round's time was spent on: the first words of its stages.
SPENT = {
    "generate": ("generate", "teach"),
    "score": ("score",),
    "train": ("train",),
    "evaluate": ("evaluate", "evaluation"),
}


def overview(data: ReportData) -> Markup:
    """HTML: the sentence and the key figures, the charts in groups, the table by round."""
    columns = columns_for(data.document["by_round"], data.document["judges"])
    return render(
        "overview.html",
        document=data.document,
        pictured=data.reader.pictured,
        sentence=sentence(data),
        figures=figures(data),
        chart=partial(chart, data),
        best_of_chart=best_of_chart(data),
        k={name: best_of(data.reader, name)[0] for name in ("best_of_k", "held_out_best_of_k")},
        generation=generation(data.reader),
        columns=columns,
        column_titles=[(column.title, column.meaning) for column in columns],
        rows=[[cell(column, row).replace("-", "−") for column in columns] for row in data.document["by_round"]],
        best=next((i for i, row in enumerate(data.document["by_round"]) if row["round"] == data.best), None),
    )


def sentence(data: ReportData) -> str:
    """Reward and held-out reward in the best round and at the start."""
    best, rounds = data.best, data.document["run"]["rounds"]
    if not rounds:
        return "No round is finished yet."
    clauses = []
    judge = f"the held-out {data.document['judges'][0]}" if len(data.document["judges"]) == 1 else "the held-out reward"
    for name, title in (("reward", "the reward"), ("held_out", judge)):
        values = {round_: point for round_, point in by_round(data.reader, name).items() if point.y is not None}
        if best in values:
            start = f", from {number(values[0].y, 2)} at the start" if 0 in values and best else ""
            top = max(values.values(), key=lambda point: point.y or 0.0)
            higher = top.x and (top.y or 0.0) > (values[best].high or values[best].y or 0.0)
            peak = f" ({number(top.y, 2)} at its highest, in round {top.x:g})" if higher else ""
            clauses.append(f"{title} is {number(values[best].y, 2)}{start}{peak}")
    measured = f"{'; '.join(clauses)}." if clauses else "nothing was measured."
    if not best and max(rounds):
        return f"No round was better than the start: {measured}"
    if best and data.document["run"]["best_by"] != "last round":
        so_far = " so far" if data.document["run"]["status"] in ("running", "interrupted") else ""
        return f"In round {best} of {max(rounds)}, the best{so_far}, {measured}"
    return measured[:1].upper() + measured[1:]


def figures(data: ReportData) -> list[dict[str, str]]:
    """The key figures: of the best round against the start, and of the whole run."""
    best, rounds = data.best, data.document["run"]["rounds"]
    entries = [("best round", str(best) if best else "start", "")] if max(rounds, default=0) else []
    for name, title in (("reward", "reward"), ("held_out", ", ".join(data.document["judges"]) or "held out")):
        values = by_round(data.reader, name)
        if best in values:
            point, remarks = values[best], []
            if point.interval:
                remarks.append(f"[{number(point.low, 2)}, {number(point.high, 2)}]")
            if 0 in values and best:
                remarks.append(f"from {number(values[0].y, 2)}")
            words = " ".join(remarks)
            if point.n is not None:
                words += f"{', ' if words else ''}{point.n:,} prompt{'s' * (point.n != 1)}"
            entries.append((title, number(point.y, 2), words))
    kls = by_round(data.reader, "kl")
    at = best or max(kls, default=0)  # where no round was better than the start, of the last one
    if at and at in kls:
        entries.append(
            ("KL to the start", number(kls[at].y, 2), f"nats per completion{'' if best else f', round {at}'}")
        )
    kept, generated = (sum(row.get(name, 0) for row in data.document["by_round"]) for name in ("kept", "samples"))
    if generated:
        entries.append(("kept of generated", f"{kept:,}", f"of {generated:,}"))
    if data.document["guarded"]:
        entries.append(("alarms", str(len(data.document["alarms"])), ""))
    links = {"alarms": "#alarms"}
    return [{"name": n, "value": value, "small": small, "href": links.get(n, "")} for n, value, small in entries]


# -- charts -----------------------------------------------------------------------------------------------------------


def points_of(data: ReportData, source: str) -> Points:
    """A number of each round: of metrics.json by its name, or `select:`, `guard:PART:`, `seconds:` and a name."""
    kind, _, name = source.partition(":")
    if kind == "select":
        return by_round(data.reader, name, "select", "summary.json")
    if kind == "guard":
        part, _, name = name.partition(":")
        return by_round(data.reader, name, "guard", part=part)
    if kind == "seconds":
        seconds = {
            round_: [value for stage, value in stages.items() if stage.split()[0] in SPENT[name]]
            for round_, stages in seconds_by_stage(data.reader.events).items()
        }
        return {round_: ChartPoint(round_, sum(values)) for round_, values in seconds.items() if values}
    if source.endswith("best_of_k"):
        k, points = best_of(data.reader, source)
        return points if k > 1 else {}
    return by_round(data.reader, source)


def chart(
    data: ReportData,
    id: str,
    title: str,
    caption: str,
    lines: Sequence[Line],
    style: str = "",
    share: bool = False,
    together: bool = False,
) -> Markup:
    """A figure by round of the lines that have numbers, and these beneath; nothing where there are none.

    A `share` is shown in per cent, and not at all where it is 0; lines that belong `together`, where each has numbers.
    """
    values = [points_of(data, source) for _, source, *_ in lines]
    if share:
        if not any(point.y for points in values for point in points.values()):
            return Markup()
        values = [{round_: in_percent(point) for round_, point in points.items()} for points in values]
    styles = [(style, "hollow")] if style else [(STYLES[i % 3], SHAPES[i % 4]) for i in range(len(lines))]
    series = [
        line(name, points, COLOURS[colour], *styles[i])
        for i, ((name, _, colour, *_), points) in enumerate(zip(lines, values, strict=True))
    ]
    series = [line for line in series if line.known()]
    if not series or (together and len(series) < len(lines)):
        return Markup()
    meanings = ", ".join(meaning for (*_, meaning), points in zip(lines, values, strict=True) if points)
    word = "published" if data.document["run"]["status"] == "finished" else "best so far"
    several = len({point.x for line in series for point in line.points}) > 1
    return render(
        "figure.html",
        id=id,
        title=title,
        caption=caption or meanings,
        svg=line_chart(
            series,
            title=title,
            description=described(series),
            x_names=START,
            mark=(data.best, word) if several else None,
        ),
        numbers=number_table(series, "round", START, label=f"{title}: numbers", best=data.best),
    )


def in_percent(point: ChartPoint) -> ChartPoint:
    low, high = (None if end is None else 100 * end for end in (point.low, point.high))
    return replace(point, y=100 * (point.y or 0.0), low=low, high=high)


def best_of_chart(data: ReportData) -> Markup:
    """The reward of the best of k samples, of the start and of the best round."""
    curves = {round_: curve(data.reader, round_, "best_of_k") for round_ in dict.fromkeys((0, data.best))}
    styles = (("start", OTHER, "dashed", "hollow"), (f"round {data.best}", REWARD, "solid", "round"))
    lines = [
        line(name, points, colour, style, shape)
        for points, (name, colour, style, shape) in zip(curves.values(), styles, strict=False)
        if len(points) > 1
    ]
    if not lines:
        return Markup()
    title, words = "Value of a larger K", described(lines)
    return render(
        "figure.html",
        id="best-of-k",
        title=title,
        caption=f"reward of the best of k samples. {worth(curves[0] or curves[data.best])}",
        svg=line_chart(lines, title=title, description=words, x_label="k: best of so many", log_x=True),
        numbers=number_table(lines, "k", label=f"{title}: numbers"),
    )


def worth(points: Points) -> str:
    """How much of the gain of the largest k half of it gives: of the start, where K is chosen."""
    ks = sorted(points)
    if len(ks) < 3:
        return ""
    one, half, full = (points[k].y or 0.0 for k in (ks[0], ks[-2], ks[-1]))
    if full <= one:
        return ""
    return f"At the start, K = {ks[-2]} gives {percent((half - one) / (full - one))} of the gain of K = {ks[-1]}."
