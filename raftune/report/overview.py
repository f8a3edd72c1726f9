"""The overview of a report: summary, charts and the table by round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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

# Charts of one number or of a few, by round: id, title, caption, (name of the line, name in metrics.json, colour) each.
Line = tuple[str, str, int]
Chart = tuple[str, str, str, Sequence[Line]]
TEXT_CHARTS: tuple[Chart, ...] = (
    ("length", "Length", "tokens of an answer", [("length", "completions/mean_length", LENGTH)]),
    (
        "cut-off",
        "Cut off",
        "% of answers that reached the length limit",
        [("cut off", "completions/clipped_ratio", LENGTH)],
    ),
    ("perplexity", "Perplexity", "of the reference answers", [("perplexity", "perplexity", OTHER)]),
    ("entropy", "Entropy", "nats per answer: how open it still is", [("entropy", "entropy", OTHER)]),
)
IMAGE_CHARTS: tuple[Chart, ...] = (
    (
        "colour",
        "Saturation and contrast",
        "how far pixels are from grey, 0 … 1; how much luminance is spread, 0 … 0.5",
        [("saturation", "saturation", LENGTH), ("contrast", "contrast", KL)],
    ),
    ("brightness", "Brightness", "mean luminance, 0 … 1", [("brightness", "brightness", OTHER)]),
    (
        "apart",
        "Variety of images",
        "how far two images of one prompt are apart, 0 … 1",
        [("pixels", "pixel_distance", DIVERSITY), ("features", "feature_distance", OTHER)],
    ),
    (
        "vendi",
        "Effective number of images",
        "Vendi score: how many different images a prompt's group is worth",
        [("Vendi", "vendi", DIVERSITY)],
    ),
    (
        "drift",
        "Drift from the start",
        "1 − cosine to the start's image of the same prompt and seed",
        [("drift", "feature_drift", BEST_OF)],
    ),
    (
        "doubtful",
        "Worth a look",
        "% of pixels that are 0 or 255; of images that repeat another; of samples without an image",
        [
            ("at the ends", "saturated_ratio", LENGTH),
            ("near duplicates", "near_duplicates", HELD_OUT),
            ("invalid", "invalid_ratio", OTHER),
        ],
    ),
)
PERCENTAGES = ("cut-off", "doubtful")  # charts that are left out where all of it is 0
VARIETY = {
    "distinct-2": ("distinct_2", "share of word pairs that are distinct"),
    "MSTTR-100": ("msttr_100", "share of distinct words in stretches of 100"),
    "similarity": ("similarity", "how alike the answers to one prompt are"),
}
# Of generated against selected samples: id, title, caption, name in the guard's metrics.json, colour.
GUARDED = (
    ("length", "Length", "mean tokens", "length", LENGTH),
    ("distinct", "distinct-2", "share of word pairs that are distinct", "distinct_2", DIVERSITY),
    ("msttr", "MSTTR-100", "share of distinct words in stretches of 100", "msttr_100", DIVERSITY),
    ("similarity", "Similarity", "how alike the answers are", "similarity", DIVERSITY),
)
GUARDED_IMAGES = (
    ("saturation", "Saturation", "mean, from grey 0 to pure colour 1", "saturation", LENGTH),
    ("contrast", "Contrast", "how much luminance is spread, 0 … 0.5", "contrast", KL),
    ("spread", "Variety", "how far as many images are apart, 0 … 1", "spread", DIVERSITY),
    (
        "repeated",
        "Near duplicates",
        "share that nearly repeats an image of another prompt",
        "near_duplicates",
        HELD_OUT,
    ),
)
# What a round's time was spent on: the first words of its stages.
SPENT = (
    ("generate", ("generate", "teach"), REWARD),
    ("score", ("score",), HELD_OUT),
    ("train", ("train",), DIVERSITY),
    ("evaluate", ("evaluate", "evaluation"), OTHER),
)
IN_FULL = {
    "kl": "How far the policy has moved from the start: the mean over its answers of log p(answer) under the policy "
    "less that under the start, in nats per answer. 0 at the start.",
    "distinct_2": "Different word pairs over all word pairs of all answers: 1 where no pair is repeated. It falls "
    "when the answers become alike, and also when there are more or longer answers.",
    "msttr": "Of every hundred words in a row, the share that are different words, on average (MSTTR-100). Unlike "
    "distinct-2 it does not depend on how much text there is.",
    "vendi": "The Vendi score: how many different images of a prompt there are in effect, by the similarity of their "
    "features. 1 where all are the same, K where nothing is shared.",
    "perplexity": "exp of the mean nats per token of the reference answers under the round's model: lower finds them "
    "likelier.",
}


def overview(data: ReportData) -> Markup:
    """HTML: the sentence and the key figures, the charts in groups, the table by round."""
    words = generation(data.reader)
    columns = columns_for(data.rows, data.judges)
    return render(
        "overview.html",
        sentence=sentence(data),
        figures=figures(data),
        alarms=len(data.document["alarms"]),
        guarded=bool(data.document["guarded"]),
        rounds=data.document["run"]["rounds"],
        gallery=bool(data.reader.pictured and data.document["compare"]["items"]),
        held_out=held_out_charts(data),
        images=[simple_chart(data, *spec) for spec in IMAGE_CHARTS],
        selection=selection_charts(data),
        time=[time_chart(data)],
        generated_by=f" Samples are generated by {words}." if words else "",
        columns=columns,
        column_titles=[(column.title, column.meaning) for column in columns],
        meanings={column.key: IN_FULL.get(column.key, column.meaning) for column in columns},
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
    found = [("best round", str(best) if best else "start", "")] if max(rounds, default=0) else []
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
            found.append((title, number(point.y, 2), words))
    kls = by_round(data.reader, "kl")
    at = best or max(kls, default=0)  # where no round was better than the start, how far the last one went astray
    if at and at in kls:
        found.append(("KL to the start", number(kls[at].y, 2), f"nats per answer{'' if best else f', round {at}'}"))
    kept, generated = (sum(row.get(name, 0) for row in data.rows) for name in ("kept", "samples"))
    if generated:
        found.append(("kept of generated", f"{kept:,}", f"of {generated:,}"))
    if data.document["guarded"]:
        found.append(("alarms", str(len(data.document["alarms"])), ""))
    links = {"alarms": "#alarms"}
    return [{"name": n, "value": value, "small": small, "href": links.get(n, "")} for n, value, small in found]


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


def simple_chart(data: ReportData, id: str, title: str, caption: str, lines: Sequence[Line]) -> Markup:
    """A chart of numbers of metrics.json by round, shares in per cent where it is one of PERCENTAGES."""
    values = [by_round(data.reader, name) for _, name, _ in lines]
    if id in PERCENTAGES:
        if not any(point.y for points in values for point in points.values()):
            return Markup()
        values = [{round_: in_percent(point) for round_, point in points.items()} for points in values]
    styles = [("dashed", "hollow")] if id == "drift" else list(zip(STYLES, SHAPES, strict=False))
    series = [
        line(name, points, colour, *style)
        for (name, _, colour), points, style in zip(lines, values, styles, strict=False)
    ]
    return chart(data, id, title, caption, *series)


def in_percent(point: ChartPoint) -> ChartPoint:
    low, high = (None if end is None else 100 * end for end in (point.low, point.high))
    return replace(point, y=100 * (point.y or 0.0), low=low, high=high)


def held_out_charts(data: ReportData) -> list[Markup]:
    """What each round's policy is like, on prompts that it is never trained on."""
    reader, found = data.reader, []
    judge = data.judges[0] if len(data.judges) == 1 else "held-out reward"
    k, best = best_of(reader, "best_of_k")
    caption = f"of the policy, and of the best of {k} samples: the headroom" if k > 1 else "of the policy"
    policy = line("policy", by_round(reader, "reward"), REWARD)
    headroom = line(f"best of {k}", best if k > 1 else {}, BEST_OF, "dashed", "hollow")
    found.append(chart(data, "reward", "Reward", caption, policy, headroom))
    k, best = best_of(reader, "held_out_best_of_k")
    policy = line("policy", by_round(reader, "held_out"), HELD_OUT)
    headroom = line(f"best of {k}", best if k > 1 else {}, OTHER, "dashed", "hollow")
    found.append(chart(data, "held-out", f"Held out: {judge}", "a reward that is never trained on", policy, headroom))
    found.append(best_of_chart(data))
    if len(data.rewards) > 1:
        parts = [
            line(name, by_round(reader, f"rewards/{name}/mean"), 1 + i % 6, shape=SHAPES[i % 4])
            for i, name in enumerate(data.rewards[:6])
        ]
        caption = "each reward alone, unweighted"
        caption += f"; the first 6 of {len(data.rewards)}" if len(data.rewards) > 6 else ""
        found.append(chart(data, "parts", "Parts of the reward", caption, *parts))
    kl = [("KL", "kl", KL)]
    found.append(simple_chart(data, "kl", "KL to the start", "nats per answer: how far it has moved", kl))
    variety = [
        line(title, by_round(reader, name), DIVERSITY if i < 2 else OTHER, STYLES[i], SHAPES[i])
        for i, (title, (name, _)) in enumerate(VARIETY.items())
    ]
    caption = ", ".join(VARIETY[line.name][1] for line in variety if line.known())
    found.append(chart(data, "variety", "Variety of words", caption, *variety))
    return found + [simple_chart(data, *spec) for spec in TEXT_CHARTS]


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


def selection_charts(data: ReportData) -> list[Markup]:
    """What each round generated against what it learned from."""

    def against(generated: Points, kept: Points, colour: int) -> list[ChartSeries]:
        return [line("generated", generated, OTHER, "dashed", "hollow"), line("selected", kept, colour)]

    generated, kept = (
        by_round(data.reader, f"reward_{name}", "select", "summary.json") for name in ("generated", "kept")
    )
    found = [chart(data, "selected-reward", "Reward", "mean score", *against(generated, kept, REWARD))]
    for id, title, caption, name, colour in GUARDED_IMAGES if data.reader.pictured else GUARDED:
        generated, kept = (by_round(data.reader, name, "guard", part=part) for part in ("generated", "selected"))
        if kept:
            found.append(chart(data, f"selected-{id}", title, caption, *against(generated, kept, colour)))
    return found


def time_chart(data: ReportData) -> Markup:
    """Seconds of each round by what they were spent on."""
    spent, _ = seconds_by_stage(data)
    lines = []
    for i, (name, stages, colour) in enumerate(SPENT):
        seconds = {
            round_: [value for stage, value in found.items() if stage.split()[0] in stages]
            for round_, found in spent.items()
        }
        points = {round_: ChartPoint(round_, sum(values)) for round_, values in seconds.items() if values}
        if points:
            lines.append(line(name, points, colour, STYLES[i % 3], SHAPES[i]))
    return chart(data, "seconds", "Time of a round", "seconds", *lines)
