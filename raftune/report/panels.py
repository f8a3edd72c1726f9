"""Chart blocks of the overview, with their numbers."""

from __future__ import annotations

from collections.abc import Mapping

from raftune.report.charts import ChartPoint, ChartSeries, line_chart
from raftune.report.charts import numbers as number_table
from raftune.report.collect import ReportData
from raftune.report.markup import block, folded, number, text
from raftune.report.numbers import ReportValue

START: Mapping[float, str] = {0: "start"}
REWARD, BEST_OF, HELD_OUT, KL, DIVERSITY, LENGTH, OTHER = range(1, 8)  # the colours: one meaning each, on every chart
LINES = ("solid", "dashed", "dotted")
Values = Mapping[int, ReportValue]


def line(name: str, values: Values, colour: int, kind: str = "solid", shape: str = "round") -> ChartSeries:
    """A line of the values by round."""
    points = tuple(ChartPoint(x, value.mean, value.low, value.high, value.n) for x, value in sorted(values.items()))
    return ChartSeries(name, points, colour, kind, shape)


def chart(found: ReportData, name: str, title: str, caption: str, *series: ChartSeries) -> str:
    """A figure by round: the lines that have numbers, and these beneath; nothing where there are none."""
    lines = [one for one in series if one.known()]
    if not lines:
        return ""
    best = found.standing.best
    several = len({point.x for one in lines for point in one.points}) > 1
    mark = (best, "published" if found.standing.state == "finished" else "best so far") if several else None
    picture = line_chart(lines, title=title, description=described(lines), x_names=START, mark=mark)
    beneath = number_table(lines, "round", START, label=f"{title}: numbers", best=best)
    return framed(name, title, caption, picture + folded("Numbers", beneath))


def framed(name: str, title: str, caption: str, inside: str) -> str:
    head = f"<figcaption><b>{text(title)}</b> {text(caption)}</figcaption>"
    return f'<figure class="chart" id="{text(name)}">{head}{inside}</figure>'


def described(lines: list[ChartSeries]) -> str:
    """The lines in words: each from its first number to its last."""
    ends = ((one.name, one.known()[0].y, one.known()[-1].y) for one in lines)
    return "; ".join(f"{name} from {number(first)} to {number(last)}" for name, first, last in ends)


def group(name: str, title: str, note: str, *charts: str) -> str:
    """A block of charts; nothing where none of them has anything to show."""
    if not any(charts):
        return ""
    return block(name, title, f'<p class="note">{text(note)}</p><div class="charts">{"".join(charts)}</div>')
