"""Line charts with interval bands, as SVG.

Colours come from CSS classes of the page; a standalone chart has its own. Series also differ by mark, dashes and label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from raftune.report.markup import number, table, text
from raftune.report.scales import AxisScale, spread, tick_text, x_scale, y_scale

WIDTH, HEIGHT = 400, 230
TOP, BOTTOM, GAP, LETTER, LINE = 16, 36, 12, 6.3, 13.5
DOTS = 24  # a longer line shows a mark at its ends only
SHAPES = ("round", "hollow", "square", "diamond")
STYLE = """
svg { font: 11px system-ui, sans-serif; color-scheme: light dark }
text { fill: #57606a } .heading { font-size: 13px; font-weight: 600; fill: #24292f }
.grid line { stroke: #e1e4e8 } .axis line { stroke: #8c959f } .mark { stroke: #9a6700; stroke-dasharray: 2 3 }
.marktext { fill: #9a6700 } .series { color: #57606a } .series text { fill: currentColor }
.s1 { color: #1d5680 } .s2 { color: #4a7396 } .s3 { color: #a5490a } .s4 { color: #73439a } .s5 { color: #1f7148 }
.s6 { color: #7d620f } .band { fill: currentColor; fill-opacity: .13 }
.line { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round }
.dashed { stroke-dasharray: 6 4 } .dotted { stroke-dasharray: 1.5 4; stroke-linecap: round }
.bar { fill: currentColor; fill-opacity: .35 } .hit { fill: transparent }
.dot { fill: currentColor; stroke: #fff } .hollow { fill: #fff; stroke: currentColor; stroke-width: 1.5 }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1 } .heading { fill: #e6edf3 } .grid line { stroke: #30363d } .axis line { stroke: #6e7681 }
.mark { stroke: #e6b84c } .marktext { fill: #e6b84c } .series { color: #9198a1 } .s1 { color: #93c4ec }
.s2 { color: #7796b0 } .s3 { color: #f0a46a } .s4 { color: #c6a2e6 } .s5 { color: #7fcf9f } .s6 { color: #d6bb62 }
.dot { stroke: #0d1117 } .hollow { fill: #0d1117; stroke: currentColor } }
"""
Names = Mapping[float, str]


@dataclass(frozen=True, slots=True)
class ChartPoint:
    """One place of a line; y is None where nothing was measured, low and high are the ends of its interval if known,
    n the number of prompts that it is a mean of."""

    x: float
    y: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class ChartSeries:
    """One line: its label, its points by x, its colour (1 … 7) and, so that colour is not all, its dashes and marks.

    `line` is solid, dashed or dotted; `shape` is round, hollow, square or diamond; `band` shows the intervals.
    """

    name: str
    points: tuple[ChartPoint, ...]
    colour: int = 1
    line: str = "solid"
    shape: str = "round"
    band: bool = True

    def known(self) -> list[ChartPoint]:
        """The points that have a number."""
        return [point for point in self.points if measured(point.y)]


@dataclass(frozen=True, slots=True)
class ChartFrame:
    """The scales of both axes."""

    x: AxisScale
    y: AxisScale


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
) -> str:
    """The lines as an <svg>, or labelled bars where all of them have one and the same x.

    `title` and `description` are what those hear who do not see it.

    `x_names` replaces the numbers of ticks, `mark` is a vertical line with a word. Numbers that are None or not finite
    are gaps. A chart that stands alone brings its style and shows its title: it can be a file of its own.
    """
    width, height = size
    xs = {point.x for line in series for point in line.known()}
    if len(xs) == 1:
        return bar_chart(
            series,
            title=title,
            description=description,
            x_label=x_label,
            x_names=x_names,
            width=width,
            standalone=standalone,
        )
    top = TOP + (22 if standalone else 0)
    frame = frame_of(series, width, top, height - BOTTOM, log_x)
    parts = [
        f"<title>{text(title)}</title>" + (f"<desc>{text(description)}</desc>" if description else ""),
        f"<style>{STYLE}</style>" + f'<text class="heading" x="2" y="14">{text(title)}</text>' if standalone else "",
        grid(frame),
        axis(frame, x_label, x_names or {}, height),
        marked(frame, mark) if mark is not None and frame.x.low <= mark[0] <= frame.x.high else "",
        *(drawn(line, frame, x_label, x_names or {}) for line in series),
        labels(series, frame, width),
    ]
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    head = f'<svg{space} viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">'
    return head + "".join(parts) + "</svg>"


def bar_chart(
    series: Sequence[ChartSeries],
    *,
    title: str,
    description: str = "",
    x_label: str = "round",
    x_names: Names | None = None,
    width: int = WIDTH,
    standalone: bool = False,
) -> str:
    """One bar for each line that has a number, from zero: its name before it, its number and interval after it."""
    lines = [line for line in series if line.known()]
    points = [line.known()[0] for line in lines]
    names = end_labels(lines, width) if len(lines) > 1 else [line.name for line in lines]
    written = [number(point.y) for point in points]
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
    left = GAP + LETTER * max(map(len, names))
    right = width - GAP - LETTER * max(map(len, written))
    low, high = min(0.0, *values), max(0.0, *values)
    x = AxisScale(low, high if high > low else 1.0, left, max(right, left + 60), ())
    top, height = TOP + (22 if standalone else 0), 26
    where = (x_names or {}).get(points[0].x, f"{x_label} {points[0].x:g}")
    parts = [
        f"<title>{text(title)}</title>" + (f"<desc>{text(description)}</desc>" if description else ""),
        f"<style>{STYLE}</style>" + f'<text class="heading" x="2" y="14">{text(title)}</text>' if standalone else "",
    ]
    for i, (line, point, name, words) in enumerate(zip(lines, points, names, written, strict=True)):
        y = top + i * height
        start, end = sorted((x(0.0), x(point.y or 0.0)))
        parts.append(
            f'<g class="series s{line.colour}"><text x="{left - 6:.1f}" y="{y + 13}" text-anchor="end">{text(name)}'
            f'</text><rect class="bar" x="{start:.1f}" y="{y + 2}" width="{max(end - start, 1):.1f}" height="14">'
            f"<title>{text(f'{line.name}, {where}: {spoken(line, point)}')}</title></rect>"
            + (
                f'<path class="line" d="M{x(point.low):.1f} {y + 9}L{x(point.high):.1f} {y + 9}"/>'
                if point.low is not None and point.high is not None and point.low < point.high
                else ""
            )
            + f'<text class="end" x="{max(end, x(point.high or 0.0)) + 6:.1f}" y="{y + 13}">{words}</text></g>'
        )
    bottom = top + len(lines) * height
    parts.append(f'<g class="axis"><text x="{left:.1f}" y="{bottom + 12}">{text(where)} alone</text></g>')
    space = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    head = f'<svg{space} class="bars" viewBox="0 0 {width} {bottom + 18}" role="img" aria-label="{text(title)}">'
    return head + "".join(parts) + "</svg>"


def numbers(
    series: Sequence[ChartSeries], x_title: str, x_names: Names | None = None, *, label: str, best: float | None = None
) -> str:
    """The numbers of the lines as a table, a row for each x; the row of `best` is marked."""
    names = x_names or {}
    xs = sorted({point.x for line in series for point in line.points})
    titles = [text(x_title)]
    for line in series:
        titles += [text(line.name)] + (["95 % interval"] if has_interval(line) else [])
        titles += ["n"] if has_n(line) else []
    rows = [[text(names.get(x, f"{x:g}")), *(cell for line in series for cell in cells(line, x))] for x in xs]
    return table(titles, rows, label=label, best=xs.index(best) if best in xs else None)


def cells(line: ChartSeries, x: float) -> list[str]:
    """The line's number at x, and its interval where the line has any."""
    point = next((point for point in line.points if point.x == x), ChartPoint(x, None))
    mean = number(point.y if measured(point.y) else None)
    known = measured(point.low) and measured(point.high)
    between = f"{number(point.low)} … {number(point.high)}" if known else "–"
    n = ["–" if point.n is None else f"{point.n:,}"] if has_n(line) else []
    return [mean, *([between] if has_interval(line) else []), *n]


def spoken(line: ChartSeries, point: ChartPoint) -> str:
    """The point's number, its interval and what it is a mean of, for who hovers over its mark or touches it."""
    words = number(point.y)
    if measured(point.low) and measured(point.high):
        words += f" [{number(point.low)}, {number(point.high)}]"
    return words if point.n is None else f"{words}, n = {point.n:,}"


def has_n(line: ChartSeries) -> bool:
    return any(point.n is not None for point in line.points)


def has_interval(line: ChartSeries) -> bool:
    return any(measured(point.low) and measured(point.high) for point in line.points)


def measured(value: float | None) -> bool:
    """Whether this is a number that can be drawn."""
    return value is not None and math.isfinite(value)


# -- frame ------------------------------------------------------------------------------------------------------------


def frame_of(series: Sequence[ChartSeries], width: float, top: float, bottom: float, log_x: bool) -> ChartFrame:
    """Scales that leave room for the labels of ticks on the left and of lines on the right."""
    points = [point for line in series for point in line.known()]
    values = [v for p in points for v in (p.y, p.low, p.high) if v is not None and math.isfinite(v)]
    y = y_scale(values, bottom, top)
    left = GAP + LETTER * max(len(tick_text(tick, y.ticks)) for tick in y.ticks)
    right = width - 14 - LETTER * max((len(label) for label in end_labels(series, width)), default=0) - 10
    return ChartFrame(x_scale([point.x for point in points], left + 6, max(right, left + 60), log=log_x), y)


def grid(frame: ChartFrame) -> str:
    """A horizontal line at each tick but the lowest, which is the axis."""
    start, end = frame.x.start - 6, frame.x.end + 4
    ats = (f"{frame.y(tick):.1f}" for tick in frame.y.ticks[1:])
    lines = (f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{at}" y2="{at}"/>' for at in ats)
    return f'<g class="grid">{"".join(lines)}</g>'


def axis(frame: ChartFrame, x_label: str, x_names: Names, height: float) -> str:
    """The lowest line, the ticks' numbers on both axes, and what the lower one counts."""
    base, start, end = frame.y(frame.y.low), frame.x.start - 6, frame.x.end + 4
    parts = [f'<line x1="{start:.1f}" x2="{end:.1f}" y1="{base:.1f}" y2="{base:.1f}"/>']
    for tick in frame.y.ticks:
        words = text(tick_text(tick, frame.y.ticks))
        parts.append(f'<text x="{start - 5:.1f}" y="{frame.y(tick) + 4:.1f}" text-anchor="end">{words}</text>')
    for tick in frame.x.ticks:
        words = text(x_names.get(tick, tick_text(tick, frame.x.ticks)))
        parts.append(f'<text x="{frame.x(tick):.1f}" y="{base + 15:.1f}" text-anchor="middle">{words}</text>')
    middle = (frame.x.start + frame.x.end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 4:.1f}" text-anchor="middle">{text(x_label)}</text>')
    return f'<g class="axis">{"".join(parts)}</g>'


def marked(frame: ChartFrame, mark: tuple[float, str]) -> str:
    """A vertical line, and its word above the plot on the side where there is more room."""
    at, top = frame.x(mark[0]), frame.y(frame.y.high)
    after = at < (frame.x.start + frame.x.end) / 2
    anchor, place = ("start", at - 2) if after else ("end", at + 2)
    return (
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 4:.1f}" y2="{frame.y(frame.y.low):.1f}"/>'
        f'<text class="marktext" x="{place:.1f}" y="{top - 6:.1f}" text-anchor="{anchor}">{text(mark[1])}</text>'
    )


# -- lines ------------------------------------------------------------------------------------------------------------


def drawn(line: ChartSeries, frame: ChartFrame, x_label: str, x_names: Names) -> str:
    """The line with its band and its marks, each mark with its number on hovering."""
    runs = list(runs_of(line.points))
    known = line.known()
    shown = known if len(known) <= DOTS else [known[0], known[-1]]
    ends = {point.x for point in shown}
    parts = [band(run, frame) for run in runs if line.band]
    parts += [path([(p.x, p.y) for p in run], frame, line.line) for run in runs if len(run) > 1]
    for point in known:
        where = f"{x_label} {x_names.get(point.x, f'{point.x:g}')}"
        words = f"{line.name}, {where}: {spoken(line, point)}"
        x, y = frame.x(point.x), frame.y(point.y or 0.0)
        parts.append(dot(x, y, line.shape if point.x in ends else "hit", words))
    return f'<g class="series s{line.colour}">{"".join(parts)}</g>'


def runs_of(points: Sequence[ChartPoint]) -> Iterator[list[ChartPoint]]:
    """The stretches between gaps."""
    for known, run in groupby(points, key=lambda point: measured(point.y)):
        if known:
            yield list(run)


def band(run: Sequence[ChartPoint], frame: ChartFrame) -> str:
    """The area between the ends of the intervals; for a single point a bar."""
    ends = [(p.x, p.low, p.high) for p in run if p.low is not None and p.high is not None and p.low < p.high]
    if not ends:
        return ""
    if len(ends) == 1:
        x, low, high = ends[0]
        return path([(x, low), (x, high)], frame, "solid")
    around = [(x, high) for x, _, high in ends] + [(x, low) for x, low, _ in reversed(ends)]
    return f'<path class="band" d="M{places(around, frame)}Z"/>'


def path(points: Sequence[tuple[float, float | None]], frame: ChartFrame, line: str) -> str:
    kind = "line" if line == "solid" else f"line {line}"
    return f'<path class="{kind}" d="M{places(points, frame)}"/>'


def places(points: Sequence[tuple[float, float | None]], frame: ChartFrame) -> str:
    return "L".join(f"{frame.x(x):.1f} {frame.y(y or 0.0):.1f}" for x, y in points)


def dot(x: float, y: float, shape: str, words: str = "") -> str:
    """A mark, with words on hovering."""
    inside = f"<title>{text(words)}</title>" if words else ""
    if shape in ("round", "hollow", "hit"):
        kind = {"hollow": "dot hollow", "round": "dot", "hit": "hit"}[shape]
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">{inside}</circle>'
    corners = {"square": "M{0} {1}m-3-3h6v6h-6z", "diamond": "M{0} {1}m0-4.4l4.4 4.4-4.4 4.4-4.4-4.4z"}[shape]
    return f'<path class="dot" d="{corners.format(f"{x:.1f}", f"{y:.1f}")}">{inside}</path>'


# -- labels -----------------------------------------------------------------------------------------------------------


def end_labels(series: Sequence[ChartSeries], width: float) -> list[str]:
    """What stands at the end of each line: its last number where there is one line, else its name, cut to its room."""
    lines = [line for line in series if line.known()]
    if len(lines) == 1 and len(series) == 1:
        return [number(lines[0].known()[-1].y)]
    most = int(width * 0.3 / LETTER)
    return [line.name if len(line.name) <= most else f"{line.name[: most - 1]}…" for line in lines]


def labels(series: Sequence[ChartSeries], frame: ChartFrame, width: float) -> str:
    """The labels beside the ends of their lines, none on another."""
    lines = [line for line in series if line.known()]
    ends = [frame.y(line.known()[-1].y or 0.0) for line in lines]
    at = spread(ends, LINE, frame.y(frame.y.high) + 2, frame.y(frame.y.low) - 2)
    x = frame.x.end + 14
    parts = []
    for line, words, y in zip(lines, end_labels(series, width), at, strict=True):
        key = dot(x, y, line.shape) if len(series) > 1 else ""
        place = x + 7 if key else x - 4
        parts.append(
            f'<g class="series s{line.colour}">{key}<text class="end" x="{place:.1f}" y="{y + 4:.1f}">'
            f"{text(words)}</text></g>"
        )
    return "".join(parts)
