"""Charts say what the numbers say, to those who see them, to those who do not, and to those who see no colours."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from raftune.report.charts import (
    ChartSeries,
    line_chart,
    nice_step,
    numbers,
    spread,
    tick_text,
    x_scale,
    y_scale,
)
from raftune.report.collect import ChartPoint
from tests.injections import HOSTILE

SVG = "{http://www.w3.org/2000/svg}"


def series(*values: float | None, name: str = "policy", band: float = 0.0) -> ChartSeries:
    """A line over rounds 0, 1, …, with intervals of this half width."""
    points = (ChartPoint(x, y, None if y is None or not band else y - band, y + band if band and y is not None else
    None)
              for x, y in enumerate(values))  # fmt: skip
    return ChartSeries(name, tuple(points))


def svg_of(*lines: ChartSeries, **options: object) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(lines, title="Reward", **options))  # type: ignore[arg-type]


def paths(svg: ElementTree.Element, kind: str) -> list[str]:
    return [e.get("d", "") for e in svg.iter() if kind in e.get("class", "").split()]


def coordinates(svg: ElementTree.Element) -> list[float]:
    names = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy")
    found = [float(e.get(name, "0")) for e in svg.iter() for name in names if e.get(name)]
    return found + [float(n) for e in svg.iter() for n in re.findall(r"-?\d+\.?\d*", e.get("d", ""))]


def circles(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(e.get("cx", "")), float(e.get("cy", ""))) for e in svg.iter("circle")]


def bars(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(e.get("x", "")), float(e.get("width", ""))) for e in svg.iter("rect")]


@pytest.mark.parametrize(
    "values",
    [(), (1.0,), (0.0,), (-3.0,), (2.0, 2.0, 2.0), (1e-9, 2e-9), (1e12, -1e12), (0.1, None, 0.3), (None, None)],
    ids=str,
)
def test_any_numbers_are_plotted_inside_the_chart(values: tuple[float | None, ...]) -> None:
    svg = svg_of(series(*values), mark=(0, "published"))
    found = coordinates(svg)
    assert all(math.isfinite(n) and -10 <= n <= 410 for n in found)
    assert len(circles(svg)) + len(bars(svg)) == sum(value is not None for value in values)


def test_a_single_round_is_bars_from_zero_each_with_its_name_its_number_and_its_interval() -> None:
    svg = svg_of(series(3.0, band=0.5), series(6.0, name="best of 4"), x_names={0: "start"})
    assert circles(svg) == []
    (start, width), (same, twice) = bars(svg)
    assert (same, twice) == (start, pytest.approx(2 * width, abs=0.2))
    assert [e.text for e in svg.iter("text")] == ["policy", "3.000", "best of 4", "6.000", "start alone"]
    ((left, y), (right, _)) = [tuple(map(float, at.split())) for at in paths(svg, "line")[0][1:].split("L")]
    assert left < start + width < right and y > 0
    assert [e.find("title").text for e in svg.iter("rect")] == [  # type: ignore[union-attr]
        "policy, start: 3.000 [2.500, 3.500]",
        "best of 4, start: 6.000",
    ]


def test_every_place_of_a_long_line_says_its_number() -> None:
    svg = svg_of(series(*map(float, range(40))))
    assert len([e for e in svg.iter("circle") if e.find("title") is not None]) == 40
    assert len([e for e in svg.iter("circle") if "dot" in e.get("class", "")]) == 2


def test_what_was_not_measured_is_a_gap_whether_none_or_nan() -> None:
    for gap in (None, float("nan")):
        svg = svg_of(series(1.0, 2.0, gap, 3.0, 4.0, band=0.1))
        assert len(paths(svg, "line")) == len(paths(svg, "band")) == 2
        assert len(circles(svg)) == 4


def test_higher_numbers_are_plotted_higher_and_later_rounds_further_right() -> None:
    places = circles(svg_of(series(1.0, 5.0, 3.0)))
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[1][1] < places[2][1] < places[0][1]


def test_lines_differ_in_more_than_colour() -> None:
    one, two = series(1.0, 2.0), ChartSeries("best of 4", series(2.0, 3.0).points, 2, "dashed", "square")
    svg = svg_of(one, two)
    assert len(paths(svg, "dashed")) == 1
    assert [e.text for e in svg.iter("text") if e.get("class") == "end"] == ["policy", "best of 4"]
    assert len(circles(svg)) == 3  # two places and the key of the label
    assert len([d for d in paths(svg, "dot") if d]) == 3


def test_the_labels_of_lines_that_end_together_do_not_lie_on_each_other() -> None:
    svg = svg_of(*(series(1.0, 2.0 + i / 1000, name=f"line {i}") for i in range(4)))
    heights = sorted(float(e.get("y", "")) for e in svg.iter("text") if e.get("class") == "end")
    assert min(np.diff(heights)) >= 13


def test_a_chart_has_a_title_and_a_description_for_screen_readers() -> None:
    svg = svg_of(series(1.0, 2.0), description="policy from 1 to 2")
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "Reward"
    assert [(e.tag, e.text) for e in list(svg)[:2]] == [("title", "Reward"), ("desc", "policy from 1 to 2")]


def test_each_mark_says_its_number_on_pointing() -> None:
    svg = svg_of(series(1.25, 2.5, band=0.25), x_names={0: "start"})
    said = [e.find("title").text for e in svg.iter("circle") if e.find("title") is not None]  # type: ignore[union-attr]
    assert said == ["policy, round start: 1.250 [1.000, 1.500]", "policy, round 1: 2.500 [2.250, 2.750]"]


def test_a_chart_that_stands_alone_is_a_file_of_its_own() -> None:
    alone, inside = (line_chart([series(1.0, 2.0)], title="Reward", standalone=yes) for yes in (True, False))
    root = ElementTree.fromstring(alone)
    assert root.tag == f"{SVG}svg"
    assert "prefers-color-scheme: dark" in alone
    assert next(e.text for e in root.iter(f"{SVG}text")) == "Reward"
    assert "<style" not in inside


def test_a_chart_of_the_page_has_no_colour_and_no_style() -> None:
    picture = line_chart([series(1.0, 2.0, band=0.3)], title="Reward", mark=(1, "published"))
    assert not re.search(r'\b(style|fill|stroke|onload|href)=', picture)  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_are_text(words: str) -> None:
    lines = [series(1.0, 2.0, name=words), series(2.0, 3.0, name=words)]
    picture = line_chart(lines, title=words, description=words, x_label=words, x_names={0: words}, mark=(1, words))
    tags = {e.tag for e in ElementTree.fromstring(picture).iter()}
    assert tags <= {"svg", "title", "desc", "g", "line", "path", "circle", "text"}
    ElementTree.fromstring(numbers(lines, words, {0: words}, label=words))


def test_the_table_beneath_holds_every_number_with_its_interval() -> None:
    lines = [series(1.0, None, 3.0, band=0.5), series(7.0, 8.0, 9.0, name="judge")]
    rows = [[c.text for c in row] for row in ElementTree.fromstring(numbers(lines, "round", label="x")).iter("tr")]
    assert rows == [
        ["round", "policy", "95 % interval", "judge"],
        ["0", "1.000", "0.500 … 1.500", "7.000"],
        ["1", "–", "–", "8.000"],
        ["2", "3.000", "2.500 … 3.500", "9.000"],
    ]


# -- scales -----------------------------------------------------------------------------------------------------------


def test_ticks_are_few_even_and_around_all_values() -> None:
    generator = np.random.Generator(np.random.Philox(3))
    for _ in range(500):
        values = (generator.normal(size=5) * 10.0 ** generator.integers(-4, 6) + generator.normal() * 10).tolist()
        scale = y_scale(values, 0, 100)
        steps = np.diff(scale.ticks)
        assert 2 <= len(scale.ticks) <= 8
        assert np.allclose(steps, steps[0], rtol=1e-3, atol=1e-12)
        assert scale.low <= min(values) and max(values) <= scale.high
        assert len({tick_text(tick, scale.ticks) for tick in scale.ticks}) == len(scale.ticks)


def test_rounds_have_whole_numbers_under_them() -> None:
    for last in (1, 2, 5, 8, 13, 40, 300):
        scale = x_scale(list(range(last + 1)), 0, 300)
        assert len(scale.ticks) <= 10
        assert all(tick == int(tick) for tick in scale.ticks)


def test_a_logarithmic_scale_puts_doublings_at_equal_distances() -> None:
    scale = x_scale([1, 2, 4, 8, 16], 0, 100, log=True)
    assert [scale(k) for k in (1, 2, 4, 8, 16)] == pytest.approx([0, 25, 50, 75, 100])
    assert scale.ticks == (1, 2, 4, 8, 16)


def test_a_step_is_nice() -> None:
    assert [nice_step(span, 5) for span in (5.0, 7.0, 11.0, 20.0, 0.03)] == pytest.approx([1, 2, 2.5, 5, 0.01])


def test_labels_are_spread_inside_their_room_in_their_order() -> None:
    generator = np.random.Generator(np.random.Philox(4))
    for _ in range(300):
        places = generator.uniform(0, 100, size=6).tolist()
        moved = spread(places, 13, 0, 100)
        assert np.argsort(places).tolist() == np.argsort(moved).tolist()
        assert min(np.diff(sorted(moved))) >= 13 - 1e-9
        assert min(moved) >= 0 and max(moved) <= 100
