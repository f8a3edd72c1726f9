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
    ChartSeries,
    described,
    line,
    line_chart,
)
from raftune.report.charts import numbers as number_table
from raftune.report.collect import ChartPoint, Points, ReportData, best_of, by_round, curve, number
from raftune.report.page import render
from raftune.report.provenance import generation, seconds_by_stage
from raftune.results.summary import cell, columns_for
from raftune.sanitize import percent

# Of a line of a chart in overview.html: its name, its name in metrics.json, its colour, and its meaning where the
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
}
# What a round's time was spent on: the first words of its stages.
SPENT = (
    ("generate", ("generate", "teach"), REWARD),
    ("score", ("score",), HELD_OUT),
    ("train", ("train",), DIVERSITY),
    ("evaluate", ("evaluate", "evaluation"), OTHER),
)


def overview(data: ReportData) -> Markup:
    """HTML: the sentence and the key figures, the charts in groups, the table by round."""
    columns = columns_for(data.rows, data.judges)
    return render(
        "overview.html",
        document=data.document,
        pictured=data.reader.pictured,
        sentence=sentence(data),
        figures=figures(data),
        reward_charts=reward_charts(data),
        chart=partial(simple_chart, data),
        against=partial(against_chart, data),
        time_chart=time_chart(data),
        generation=generation(data.reader),
        columns=columns,
        column_titles=[(column.title, column.meaning) for column in columns],
        rows=[[cell(column, row).replace("-", "−") for column in columns] for row in data.rows],
        best=next((i for i, row in enumerate(data.rows) if row["round"] == data.best), None),
    )


def sentence(data: ReportData) -> str:
    """Reward and held-out reward in the best round and at the start."""
    best, rounds = data.best, data.document["run"]["rounds"]
    if not rounds:
        return "No round is finished yet."
    clauses = []
    judge = f"the held-out {data.judges[0]}" if len(data.judges) == 1 else "the held-out reward"
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
    for name, title in (("reward", "reward"), ("held_out", ", ".join(data.judges) or "held out")):
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
        entries.append(("KL to the start", number(kls[at].y, 2), f"nats per answer{'' if best else f', round {at}'}"))
    kept, generated = (sum(row.get(name, 0) for row in data.rows) for name in ("kept", "samples"))
    if generated:
        entries.append(("kept of generated", f"{kept:,}", f"of {generated:,}"))
    if data.document["guarded"]:
        entries.append(("alarms", str(len(data.document["alarms"])), ""))
    links = {"alarms": "#alarms"}
    return [{"name": n, "value": value, "small": small, "href": links.get(n, "")} for n, value, small in entries]


# -- charts -----------------------------------------------------------------------------------------------------------


def chart(data: ReportData, id: str, title: str, caption: str, *series: ChartSeries) -> Markup:
    """A figure by round: the lines that have numbers, and these beneath; nothing where there are none."""
    lines = [line for line in series if line.known()]
    if not lines:
        return Markup()
    several = len({point.x for line in lines for point in line.points}) > 1
    word = "published" if data.document["run"]["status"] == "finished" else "best so far"
    mark = (data.best, word) if several else None
    picture = line_chart(lines, title=title, description=described(lines), x_names=START, mark=mark)
    beneath = number_table(lines, "round", START, label=f"{title}: numbers", best=data.best)
    return render("figure.html", id=id, title=title, caption=caption, picture=picture, numbers=beneath)


def simple_chart(
    data: ReportData, id: str, title: str, caption: str, lines: Sequence[Line], style: str = "", share: bool = False
) -> Markup:
    """A chart of numbers of metrics.json by round; a `share` is shown in per cent, and not at all where it is 0."""
    values = [by_round(data.reader, name) for _, name, *_ in lines]
    if share:
        if not any(point.y for points in values for point in points.values()):
            return Markup()
        values = [{round_: in_percent(point) for round_, point in points.items()} for points in values]
    styles = [(style, "hollow")] if style else list(zip(STYLES, SHAPES, strict=False))
    series = [
        line(name, points, COLOURS[colour], *styles[i])
        for i, ((name, _, colour, *_), points) in enumerate(zip(lines, values, strict=True))
    ]
    meanings = ", ".join(meaning for (*_, meaning), points in zip(lines, values, strict=True) if points)
    return chart(data, id, title, caption or meanings, *series)


def in_percent(point: ChartPoint) -> ChartPoint:
    low, high = (None if end is None else 100 * end for end in (point.low, point.high))
    return replace(point, y=100 * (point.y or 0.0), low=low, high=high)


def reward_charts(data: ReportData) -> list[Markup]:
    """The rewards of each round's policy, on prompts that it is never trained on."""
    reader, charts = data.reader, []
    k, best = best_of(reader, "best_of_k")
    caption = f"of the policy, and of the best of {k} samples: the headroom" if k > 1 else "of the policy"
    policy = line("policy", by_round(reader, "reward"), REWARD)
    headroom = line(f"best of {k}", best if k > 1 else {}, BEST_OF, "dashed", "hollow")
    charts.append(chart(data, "reward", "Reward", caption, policy, headroom))
    judge = data.judges[0] if len(data.judges) == 1 else "held-out reward"
    k, best = best_of(reader, "held_out_best_of_k")
    policy = line("policy", by_round(reader, "held_out"), HELD_OUT)
    headroom = line(f"best of {k}", best if k > 1 else {}, OTHER, "dashed", "hollow")
    charts.append(chart(data, "held-out", f"Held out: {judge}", "a reward that is never trained on", policy, headroom))
    charts.append(best_of_chart(data))
    if len(data.rewards) > 1:
        parts = [
            line(name, by_round(reader, f"rewards/{name}/mean"), 1 + i % 6, shape=SHAPES[i % 4])
            for i, name in enumerate(data.rewards[:6])
        ]
        caption = "each reward alone, unweighted"
        caption += f"; the first 6 of {len(data.rewards)}" if len(data.rewards) > 6 else ""
        charts.append(chart(data, "parts", "Parts of the reward", caption, *parts))
    return charts


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
    title, words = "Worth of a larger K", described(lines)
    return render(
        "figure.html",
        id="best-of-k",
        title=title,
        caption=f"reward of the best of k samples. {worth(curves[0] or curves[data.best])}",
        picture=line_chart(lines, title=title, description=words, x_label="k: best of so many", log_x=True),
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


def against_chart(data: ReportData, id: str, title: str, caption: str, name: str, colour: str) -> Markup:
    """What each round generated against what it learned from: its reward, or a measure of the guards."""
    if name == "reward":
        generated, kept = (
            by_round(data.reader, f"reward_{part}", "select", "summary.json") for part in ("generated", "kept")
        )
    else:
        generated, kept = (by_round(data.reader, name, "guard", part=part) for part in ("generated", "selected"))
        if not kept:
            return Markup()
    lines = (line("generated", generated, OTHER, "dashed", "hollow"), line("selected", kept, COLOURS[colour]))
    return chart(data, f"selected-{id}", title, caption, *lines)


def time_chart(data: ReportData) -> Markup:
    """Seconds of each round by what they were spent on."""
    spent, _ = seconds_by_stage(data)
    lines = []
    for i, (name, stages, colour) in enumerate(SPENT):
        seconds = {
            round_: [value for stage, value in stage_seconds.items() if stage.split()[0] in stages]
            for round_, stage_seconds in spent.items()
        }
        points = {round_: ChartPoint(round_, sum(values)) for round_, values in seconds.items() if values}
        if points:
            lines.append(line(name, points, colour, STYLES[i % 3], SHAPES[i]))
    return chart(data, "seconds", "Time of a round", "seconds", *lines)
