"""Line charts with interval bands, as SVG, and their numbers as tables.

Colours come from CSS classes of the page; a standalone chart has its own. Series also differ by mark, dashes and label.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from markupsafe import Markup

from raftune.report.collect import ChartPoint, Points, number
from raftune.report.page import asset, environment, render

WIDTH, HEIGHT = 400, 230
TOP, BOTTOM, GAP, LETTER, LINE = 16, 36, 12, 6.3, 13.5
DOTS = 24  # a longer line shows a mark at its ends only
SHAPES = ("round", "hollow", "square", "diamond")
STYLES = ("solid", "dashed", "dotted")
START: Mapping[float, str] = {0: "start"}
REWARD, BEST_OF, HELD_OUT, KL, DIVERSITY, LENGTH, OTHER = range(1, 8)  # the colours: one meaning each, on every chart
Names = Mapping[float, str]


@dataclass(frozen=True, slots=True)
class ChartSeries:
    """One line: its label, its points by x, its colour (1 … 7) and, so that colour is not all, its dashes and marks.

    `line` is solid, dashed or dotted; `shape` is round, hollow, square or diamond.
    """

    name: str
    points: tuple[ChartPoint, ...]
    colour: int = 1
    line: str = "solid"
    shape: str = "round"

    def known(self) -> list[ChartPoint]:
        """The points that have a number."""
        return [point for point in self.points if measured(point.y)]


def line(name: str, points: Points, colour: int, style: str = "solid", shape: str = "round") -> ChartSeries:
    """A line of the points by round, or by k."""
    return ChartSeries(name, tuple(points[x] for x in sorted(points)), colour, style, shape)


def measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def described(lines: Sequence[ChartSeries]) -> str:
    """The lines in words: each from its first number to its last."""
    ends = ((line.name, line.known()[0].y, line.known()[-1].y) for line in lines)
    return "; ".join(f"{name} from {number(first)} to {number(last)}" for name, first, last in ends)


def line_chart(
    series: Sequence[ChartSeries],
    *,
    title: str,
    description: str = "",
    x_label: str = "round",
    x_names: Names | None = None,
    log_x: bool = False,
    mark: tuple[float, str] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    standalone: bool = False,
) -> Markup:
    """The lines as an <svg>, or labelled bars where all of them have one and the same x.

    `title` and `description` are what those hear who do not see it. `x_names` replaces the numbers of ticks, `mark` is
    a vertical line with a word. Numbers that are None or not finite are gaps. A chart that stands alone brings its
    style and shows its title: it can be a file of its own.
    """
    (width, height), names, lines = size, x_names or {}, [line for line in series if line.known()]
    points = [point for line in lines for point in line.known()]
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
    top = TOP + (22 if standalone else 0)
    most = int(width * 0.3 / LETTER)
    labels = [line.name if len(line.name) <= most else f"{line.name[: most - 1]}…" for line in lines]
    common: dict[str, Any] = {"title": title, "description": description, "width": width, "standalone": standalone}
    common |= {"style": Markup("\n" + asset("chart.css"))}
    if len({point.x for point in points}) == 1:
        labels = labels if len(lines) > 1 else [lines[0].name]
        left = GAP + LETTER * max(map(len, labels))
        right = width - GAP - LETTER * max(len(number(point.y)) for point in points)
        low, high = min(0.0, *values), max(0.0, *values)
        x = AxisScale(low, high if high > low else 1.0, left, max(right, left + 60), ())
        common |= {"place": names.get(points[0].x, f"{x_label} {points[0].x:g}"), "height": top + len(lines) * 26 + 18}
        return render("chart.svg", **common, bars=list(zip(lines, points, labels, strict=True)), x=x, top=top)

    y = y_scale(values, height - BOTTOM, top)
    if len(series) == 1 and lines:
        labels = [number(points[-1].y)]
    left = GAP + LETTER * max(len(tick_text(tick, y.ticks)) for tick in y.ticks)
    right = width - 14 - LETTER * max(map(len, labels), default=0) - 10
    x = x_scale([point.x for point in points], left + 6, max(right, left + 60), log=log_x)
    ends = spread([y(line.known()[-1].y or 0.0) for line in lines], LINE, y(y.high) + 2, y(y.low) - 2)
    drawings = [(line, paths(line, x, y), marks(line, x, y, x_label, names)) for line in lines]
    common |= {"height": height, "x": x, "y": y, "tick_text": tick_text, "x_names": names, "x_label": x_label}
    labelled = list(zip(lines, labels, ends, strict=True))
    return render("chart.svg", **common, mark=mark, lines=drawings, labels=labelled, several=len(series) > 1)


def paths(line: ChartSeries, x: AxisScale, y: AxisScale) -> list[tuple[str, str]]:
    """Class and path of each band of intervals, a bar for a single point, and of each stretch between gaps."""

    def places(points: Sequence[tuple[float, float | None]]) -> str:
        return "M" + "L".join(f"{x(at):.1f} {y(value or 0.0):.1f}" for at, value in points)

    runs = [list(run) for known, run in groupby(line.points, key=lambda point: measured(point.y)) if known]
    result = []
    for run in runs:
        ends = [(p.x, p.low, p.high) for p in run if p.low is not None and p.high is not None and p.low < p.high]
        if len(ends) == 1:
            at, low, high = ends[0]
            result.append(("line", places([(at, low), (at, high)])))
        elif ends:
            around = [(at, high) for at, _, high in ends] + [(at, low) for at, low, _ in reversed(ends)]
            result.append(("band", places(around) + "Z"))
    kind = "line" if line.line == "solid" else f"line {line.line}"
    return result + [(kind, places([(p.x, p.y) for p in run])) for run in runs if len(run) > 1]


def marks(
    line: ChartSeries, x: AxisScale, y: AxisScale, x_label: str, names: Names
) -> list[tuple[str, float, float, str]]:
    """Shape, place and words of each point; of a long line only the first and the last can be seen."""
    points = line.known()
    shown = points if len(points) <= DOTS else [points[0], points[-1]]
    return [
        (
            line.shape if point in shown else "hit",
            x(point.x),
            y(point.y or 0.0),
            f"{line.name}, {x_label} {names.get(point.x, f'{point.x:g}')}: {point.words}",
        )
        for point in points
    ]


def numbers(
    series: Sequence[ChartSeries], x_title: str, x_names: Names | None = None, *, label: str, best: float | None = None
) -> Markup:
    """The numbers of the lines as a table, a row for each x; the row of `best` is marked."""
    xs = sorted({point.x for line in series for point in line.points})
    titles, columns = [x_title], [[(x_names or {}).get(x, f"{x:g}") for x in xs]]
    for line in series:
        points = {point.x: point for point in line.points}
        at = [points.get(x, ChartPoint(x, None)) for x in xs]
        titles.append(line.name)
        columns.append([number(point.y if measured(point.y) else None) for point in at])
        if any(point.interval for point in at):
            titles.append("95 % interval")
            columns.append([f"{number(p.low)} … {number(p.high)}" if p.interval else "–" for p in at])
        if any(point.n is not None for point in at):
            titles.append("n")
            columns.append(["–" if point.n is None else f"{point.n:,}" for point in at])
    macros: Any = environment().get_template("macros.html").module
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Markup(macros.table(titles, rows, label, xs.index(best) if best in xs else None))


# -- scales -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AxisScale:
    """Maps [low, high] of the data to [start, end] of the page, linearly or by the logarithm; `ticks` lie inside."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log2(v) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (at - low) / (high - low)
        return self.start + share * (self.end - self.start)


def y_scale(values: Sequence[float], start: float, end: float) -> AxisScale:
    """A scale whose ends are ticks; it begins at zero where that costs little, a single value lies in its middle."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        room = abs(low) * 0.1 or 0.5
        low, high = low - room, high + room
        low = max(low, 0.0) if values and values[0] >= 0 else low
    elif 0 <= low <= high / 2:
        low = 0.0
    step = nice_step(high - low, 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return AxisScale(ticks[0], ticks[-1], start, end, ticks)


def x_scale(values: Sequence[float], start: float, end: float, *, log: bool = False) -> AxisScale:
    """A scale from the first value to the last, with ticks at whole numbers where the values are whole.

    A logarithmic one has its ticks at the values, or at nine of them.
    """
    xs = sorted(set(values)) or [0.0]
    low, high = xs[0], xs[-1]
    if log or low == high or len(xs) <= 4:
        return AxisScale(low, high, start, end, tuple(xs[:: -math.ceil(len(xs) / 9)][::-1]), log)
    step = nice_step(high - low, 8)
    if all(value == int(value) for value in xs):
        step = max(1.0, math.ceil(step))
    ticks = tuple(round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1))
    return AxisScale(low, high, start, end, ticks)


def nice_step(span: float, parts: int) -> float:
    """The smallest of 1, 2, 2.5 or 5 times a power of ten that divides the span into at most so many parts."""
    rough = span / parts
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1.0, 2.0, 2.5, 5.0, 10.0) if n * power >= rough * (1 - 1e-9))


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """The tick with as many decimals as tell it from its neighbours, and a true minus."""
    largest = max(abs(t) for t in ticks)
    step = min((b - a for a, b in pairwise(ticks)), default=largest or 1.0)
    if largest >= 1e6 or (largest and largest < 1e-3):
        digits = next((d for d in range(2, 15) if len({f"{t:.{d}g}" for t in ticks}) == len(ticks)), 15)
        return f"{value:.{digits}g}".replace("-", "−")
    digits = next((d for d in range(9) if all(abs(t - round(t, d)) < step * 1e-6 for t in ticks)), 9)
    return f"{value:,.{digits}f}".replace("-", "−")


def spread(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """The places moved as little as it takes that each is so far from the next, inside [low, high] if there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for i in order:
        moved[i] = max(moved[i], low)
        low = moved[i] + distance
    for i in reversed(order):
        moved[i] = min(moved[i], high)
        high = moved[i] - distance
    return moved
