"""The overview of a report: summary, charts and the table by round."""

from __future__ import annotations

from collections.abc import Mapping

from raftune.report import numbers
from raftune.report.charts import SHAPES, ChartSeries, line_chart
from raftune.report.charts import numbers as number_table
from raftune.report.collect import ReportData
from raftune.report.markup import block, facts, folded, number, table, text
from raftune.report.numbers import ReportValue
from raftune.report.painted import PICTURE_GUARDED, gallery, picture_charts
from raftune.report.panels import (
    BEST_OF,
    DIVERSITY,
    HELD_OUT,
    KL,
    LENGTH,
    LINES,
    OTHER,
    REWARD,
    Values,
    chart,
    described,
    framed,
    group,
    line,
)
from raftune.report.provenance import generation, seconds_by_stage
from raftune.results.summary import cell, columns_for
from raftune.sanitize import percent


def overview(found: ReportData) -> str:
    """HTML: the sentence and the key figures, the charts in groups, the table by round."""
    parts = (summary, gallery, held_out_charts, picture_charts, selection_charts, time_charts, by_round)
    return "".join(part(found) for part in parts)


# -- what came of it --------------------------------------------------------------------------------------------------


def summary(found: ReportData) -> str:
    lead = f'<p class="lead">{sentence(found)}</p>'
    return block("summary", "What came of it", lead + facts(figures(found)))


def sentence(found: ReportData) -> str:
    """Reward and held-out reward in the best round and at the start, and whether anything asks for a look."""
    reader, best = found.reader, found.standing.best
    if not found.standing.rounds:
        return "No round is finished yet."
    parts = []
    for name, title in (("reward", "the reward"), ("held_out", judge_name(found))):
        values = numbers.by_round(reader, name)
        if best in values:
            start = f", from {number(values[0].mean, 2)} at the start" if 0 in values and best else ""
            parts.append(f"{text(title)} is {number(values[best].mean, 2)}{start}{peak(values, best)}")
    told = f"{'; '.join(parts)}." if parts else "nothing was measured."
    where = place_words(found)
    return f"{where + told if where else told[:1].upper() + told[1:]} {alarm_words(found)}".strip()


def peak(values: Values, best: int) -> str:
    """Where, after the start, the numbers were clearly higher than in the best round: outside of its interval."""
    top = max(values, key=lambda round_: values[round_].mean)
    if top == 0 or values[top].mean <= (values[best].high or values[best].mean):
        return ""
    return f" ({number(values[top].mean, 2)} at its highest, in round {top})"


def place_words(found: ReportData) -> str:
    """Which round the sentence speaks of; nothing where there is the start alone."""
    best, last = found.standing.best, max(found.standing.rounds)
    if not best:
        return "No round was better than the start: " if last else ""
    so_far = " so far" if found.standing.state in ("running", "interrupted") else ""
    return f"In round {best} of {last}, the best{so_far}, " if found.standing.best_by != "last round" else ""


def judge_name(found: ReportData) -> str:
    judges = found.standing.judges
    return f"the held-out {judges[0]}" if len(judges) == 1 else "the held-out reward"


def alarm_words(found: ReportData) -> str:
    """How many alarms there are, with a link to them; that there were no guards is said too."""
    alarms = found.document["alarms"]
    if alarms:
        count = f"{len(alarms)} alarm{'s' if len(alarms) > 1 else ''}"
        return f'<a href="#alarms">{count}</a>: worth a look.'
    if found.reader.rounds("guard"):
        return "No alarm."
    return "No guards looked at it." if max(found.standing.rounds) else ""


def figures(found: ReportData) -> list[tuple[str, str]]:
    """The key figures: of the best round against the start, and of the whole run."""
    best = found.standing.best
    pairs = [("best round", str(best) if best else "start")] if max(found.standing.rounds, default=0) else []
    named = (("reward", "reward"), ("held_out", ", ".join(found.standing.judges) or "held out"))
    pairs += [(title, figure_) for name, title in named if (figure_ := figure(found, name))]
    kls = numbers.by_round(found.reader, "kl")
    at = best or max(kls, default=0)  # where no round was better than the start, how far the last one went astray
    if at and at in kls:
        where = "" if best else f", round {at}"
        pairs.append(("KL to the start", f"{number(kls[at].mean, 2)} <small>nats per answer{where}</small>"))
    kept, drawn = (sum(row.get(name, 0) for row in found.rows) for name in ("kept", "samples"))
    pairs += [("kept of generated", f"{kept:,} <small>of {drawn:,}</small>")] if drawn else []
    if found.reader.rounds("guard"):
        pairs.append(("alarms", f'<a href="#alarms">{len(found.document["alarms"])}</a>'))
    return pairs


def figure(found: ReportData, name: str) -> str:
    """The number in the best round with its interval, and what it was at the start."""
    values, best = numbers.by_round(found.reader, name), found.standing.best
    if best not in values:
        return ""
    start = f" from {number(values[0].mean, 2)}" if 0 in values and best else ""
    words = f"{interval_words(values[best])}{start}{prompts_words(values[best])}".strip(", ")
    return f"{number(values[best].mean, 2)} <small>{words}</small>"


def prompts_words(value: ReportValue) -> str:
    """How many prompts the mean stands on."""
    return "" if value.n is None else f", {value.n:,} prompt{'s' * (value.n != 1)}"


def interval_words(value: ReportValue) -> str:
    """The interval, where there is one."""
    if value.low is None or value.high is None:
        return ""
    return f"[{number(value.low, 2)}, {number(value.high, 2)}]"


# -- charts -----------------------------------------------------------------------------------------------------------


def held_out_charts(found: ReportData) -> str:
    """What each round's policy is like, on prompts that it is never trained on."""
    note = (
        "Measured after every round on held-out prompts. Bands are 95 % intervals over prompts; the upright dotted "
        "line is the best round."
    )
    parts = (reward_chart, judge_chart, best_of_chart, parts_chart, kl_chart, variety_chart, *LENGTHS)
    return group("measures", "On held-out prompts", note, *(part(found) for part in parts))


def reward_chart(found: ReportData) -> str:
    k, best_of = numbers.best_of(found.reader, "best_of_k")
    return chart(
        found,
        "reward",
        "Reward",
        f"of the policy, and of the best of {k} samples: the headroom" if k > 1 else "of the policy",
        line("policy", numbers.by_round(found.reader, "reward"), REWARD),
        line(f"best of {k}", best_of if k > 1 else {}, BEST_OF, "dashed", "hollow"),
    )


def judge_chart(found: ReportData) -> str:
    judges = found.standing.judges
    name = judges[0] if len(judges) == 1 else "held-out reward"
    k, best_of = numbers.best_of(found.reader, "held_out_best_of_k")
    return chart(
        found,
        "held-out",
        f"Held out: {name}",
        "a reward that is never trained on",
        line("policy", numbers.by_round(found.reader, "held_out"), HELD_OUT),
        line(f"best of {k}", best_of if k > 1 else {}, OTHER, "dashed", "hollow"),
    )


def parts_chart(found: ReportData) -> str:
    """Each reward alone, where there are several."""
    names = found.standing.rewards
    lines = [
        line(name, numbers.by_round(found.reader, f"rewards/{name}/mean"), 1 + i % 6, shape=SHAPES[i % 4])
        for i, name in enumerate(names[:6])
    ]
    note = "each reward alone, unweighted" + (f"; the first 6 of {len(names)}" if len(names) > 6 else "")
    return chart(found, "parts", "Parts of the reward", note, *lines) if len(names) > 1 else ""


def kl_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "kl")
    return chart(found, "kl", "KL to the start", "nats per answer: how far it has moved", line("KL", values, KL))


def variety_chart(found: ReportData) -> str:
    named = (("distinct-2", "distinct_2"), ("MSTTR-100", "msttr_100"), ("similarity", "similarity"))
    lines = [
        line(title, numbers.by_round(found.reader, name), DIVERSITY if i < 2 else OTHER, LINES[i], SHAPES[i])
        for i, (title, name) in enumerate(named)
    ]
    measured = ", ".join(MEANINGS[one.name] for one in lines if one.known())
    return chart(found, "variety", "Variety of words", measured, *lines)


MEANINGS = {
    "distinct-2": "share of word pairs that are distinct",
    "MSTTR-100": "share of distinct words in stretches of 100",
    "similarity": "how alike the answers to one prompt are",
}


def length_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "completions/mean_length")
    return chart(found, "length", "Length", "tokens of an answer", line("length", values, LENGTH))


def cut_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "completions/clipped_ratio")
    shares = {round_: ReportValue(100 * value.mean) for round_, value in values.items()}
    shown = line("cut off", shares if any(value.mean for value in values.values()) else {}, LENGTH)
    return chart(found, "cut-off", "Cut off", "% of answers that reached the length limit", shown)


def perplexity_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "perplexity")
    return chart(found, "perplexity", "Perplexity", "of the reference answers", line("perplexity", values, OTHER))


def entropy_chart(found: ReportData) -> str:
    values = numbers.by_round(found.reader, "entropy")
    return chart(found, "entropy", "Entropy", "nats per answer: how open it still is", line("entropy", values, OTHER))


LENGTHS = (length_chart, cut_chart, perplexity_chart, entropy_chart)


# -- best of k --------------------------------------------------------------------------------------------------------


def best_of_chart(found: ReportData) -> str:
    """The reward of the best of k samples, of the start and of the best round."""
    best = found.standing.best
    curves = {round_: numbers.curve(found.reader, round_, "best_of_k") for round_ in dict.fromkeys((0, best))}
    lines = [
        line("start" if round_ == 0 else f"round {round_}", curve, OTHER if round_ == 0 else REWARD, *how)
        for (round_, curve), how in zip(curves.items(), (("dashed", "hollow"), ("solid", "round")), strict=False)
        if len(curve) > 1
    ]
    if not lines:
        return ""
    title = "Worth of a larger K"
    picture = line_chart(lines, title=title, description=described(lines), x_label="k: best of so many", log_x=True)
    beneath = number_table(lines, "k", label=f"{title}: numbers")
    caption = f"reward of the best of k samples. {worth(curves[0] or curves[best])}"
    return framed("best-of-k", title, caption, picture + folded("Numbers", beneath))


def worth(curve: Values) -> str:
    """How much of the gain of the largest k half of it gives: of the start, where K is chosen."""
    ks = sorted(curve)
    if len(ks) < 3:
        return ""
    one, half, full = curve[ks[0]].mean, curve[ks[-2]].mean, curve[ks[-1]].mean
    if full <= one:
        return ""
    return f"At the start, K = {ks[-2]} gives {percent((half - one) / (full - one))} of the gain of K = {ks[-1]}."


# -- selection --------------------------------------------------------------------------------------------------------


def selection_charts(found: ReportData) -> str:
    """What each round generated against what it learned from."""
    note = "Every round's own training prompts: all that was generated against what was selected from it."
    reader = found.reader
    drawn, kept = (numbers.summarised(reader, f"reward_{which}") for which in ("generated", "kept"))
    charts = [
        chart(found, "selected-reward", "Reward", "mean score", *against(drawn, kept, REWARD)),
        *(
            chart(found, f"selected-{slug}", title, caption, *guarded_lines(found, name, colour))
            for slug, title, caption, name, colour in (PICTURE_GUARDED if reader.pictured else GUARDED)
        ),
    ]
    return group("selection", "Generated against selected", note, *charts)


GUARDED = (
    ("length", "Length", "mean tokens", "length", LENGTH),
    ("distinct", "distinct-2", "share of word pairs that are distinct", "distinct_2", DIVERSITY),
    ("msttr", "MSTTR-100", "share of distinct words in stretches of 100", "msttr_100", DIVERSITY),
    ("similarity", "Similarity", "how alike the answers are", "similarity", DIVERSITY),
)


def guarded_lines(found: ReportData, name: str, colour: int) -> list[ChartSeries]:
    drawn, kept = (numbers.guarded(found.reader, which, name) for which in ("generated", "selected"))
    return against(drawn, kept, colour) if kept else []


def against(drawn: Values, kept: Values, colour: int) -> list[ChartSeries]:
    return [line("generated", drawn, OTHER, "dashed", "hollow"), line("selected", kept, colour)]


# -- times ------------------------------------------------------------------------------------------------------------


def time_charts(found: ReportData) -> str:
    """Seconds of each round by what they were spent on."""
    spent, _ = seconds_by_stage(found)
    lines = [
        line(name, share, colour, LINES[i % 3], SHAPES[i])
        for i, (name, stages, colour) in enumerate(SPENT)
        if (share := spent_on(spent, stages))
    ]
    note = "Over all the sessions that worked on it. The configuration's screen has every stage."
    words = generation(found.reader)
    note += f" Samples are generated by {words}." if words else ""
    return group("time", "Time", note, chart(found, "seconds", "Time of a round", "seconds", *lines))


SPENT = (
    ("generate", ("generate", "teach"), REWARD),
    ("score", ("score",), HELD_OUT),
    ("train", ("train",), DIVERSITY),
    ("evaluate", ("evaluate", "evaluation"), OTHER),
)


def spent_on(spent: Mapping[int, Mapping[str, float]], stages: tuple[str, ...]) -> dict[int, ReportValue]:
    """The seconds of those stages, in every round that came to them; those of evaluations by their first word."""
    sums = {
        round_: [seconds for stage, seconds in one.items() if stage.split()[0] in stages]
        for round_, one in spent.items()
    }
    return {round_: ReportValue(sum(found)) for round_, found in sums.items() if found}


# -- by round ---------------------------------------------------------------------------------------------------------


def by_round(found: ReportData) -> str:
    """Every number of every round, as the command line shows it at the end of a run."""
    if not found.rows:
        return ""
    columns = columns_for(found.rows, found.standing.judges)
    best = next((i for i, row in enumerate(found.rows) if row["round"] == found.standing.best), None)
    rows = [[text(cell(column, row)).replace("-", "−") for column in columns] for row in found.rows]
    titles = [f'<abbr title="{text(column.meaning)}">{text(column.title)}</abbr>' for column in columns]
    meanings = "".join(
        f"<div><dt>{text(column.title)}</dt><dd>{text(IN_FULL.get(column.key, column.meaning))}</dd></div>"
        for column in columns
    )
    inside = table(titles, rows, label="Numbers of each round", best=best)
    return block(
        "by-round", "By round", inside + folded("What the columns mean", f'<dl class="meanings">{meanings}</dl>')
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
