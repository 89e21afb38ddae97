"""Plots: points where they belong, ticks that are round, gaps where nothing was measured."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.evaluation.page_charts import Bar, bar_chart, heat_map
from ldm.evaluation.plots import LARGEST, Axis, Series, line_plot, linear_ticks, log_ticks, tick_text


def elements(svg: str, kind: str, css: str = "") -> list[ElementTree.Element]:
    return [one for one in ElementTree.fromstring(svg).iter(kind) if css in (one.get("class") or "")]


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in str(element.get("points")).split())
    return [(float(x), float(y)) for x, y in pairs]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(3, 9))
def test_linear_ticks_are_even_round_and_inside(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = linear_ticks(low, high, count)
    assert 1 <= len(ticks) <= 1.6 * count + 1  # the steps next to each other differ by a factor of up to 2.5
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = {round((b - a) / span, 4) for a, b in itertools.pairwise(ticks)}
    assert len(steps) <= 1


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(0.02, 0.4) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert log_ticks(1, 1e12) == pytest.approx([1, 1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
    assert [tick_text(v) for v in (0, 0.05, 20000, 1e-6, 2500)] == ["0", "0.05", "20k", "1e-06", "2500"]


def test_an_axis_maps_its_ends_and_middle() -> None:
    axis, log = Axis(10, 20, 100, 300), Axis(0.01, 100, 0, 4, log=True)
    assert [axis.place(v) for v in (10, 15, 20, 25)] == [100, 200, 300, 300]
    assert [log.place(v) for v in (0.01, 1, 100)] == pytest.approx([0, 2, 4])


def test_a_line_lies_where_its_values_are() -> None:
    svg = line_plot([Series(label="a", x=[0, 1, 2], y=[0, 10, 5])], title="t", x_label="x", y_label="y")
    (line,) = elements(svg, "polyline")
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 < y2 < y0  # down is large in SVG
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.11)


def test_what_is_not_finite_leaves_a_gap() -> None:
    series = Series(label="a", x=[0, 1, 2, 3, 4, 5], y=[1, 2, math.nan, 3, 4, math.inf])
    svg = line_plot([series], title="t", x_label="x", y_label="y")
    assert [len(points(line)) for line in elements(svg, "polyline")] == [2, 2]
    with pytest.raises(ValueError, match="no finite point"):
        line_plot([Series(label="a", x=[0], y=[math.nan])], title="t", x_label="x", y_label="y")


def test_a_band_encloses_its_line() -> None:
    series = Series(label="", x=[0, 1], y=[1, 2], low=[0, 1], high=[2, 3])
    svg = line_plot([series], title="t", x_label="x", y_label="y")
    (band,), (line,) = elements(svg, "polygon"), elements(svg, "polyline")
    upper, lower = points(band)[:2], points(band)[2:][::-1]
    for (_, top), (_, y), (_, bottom) in zip(upper, points(line), lower, strict=True):
        assert top < y < bottom


def test_a_logarithmic_axis_needs_values_above_zero() -> None:
    series = Series(label="", x=[0, 1], y=[0, 100])
    svg = line_plot([series], title="t", x_label="x", y_label="y", log_y=True)
    assert {"0", "20", "100"} <= {one.text for one in elements(svg, "text")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(allow_nan=True)), min_size=1, max_size=20))
def test_any_numbers_make_a_picture_or_a_clear_refusal(pairs: list[tuple[float, float]]) -> None:
    series = Series(label="a", x=[x for x, _ in pairs], y=[y for _, y in pairs], dots=True)
    if not any(abs(y) < LARGEST for _, y in pairs):
        with pytest.raises(ValueError, match="no finite point"):
            line_plot([series], title="t", x_label="x", y_label="y")
        return
    svg = line_plot([series], title="t", x_label="x", y_label="y")
    ElementTree.fromstring(svg)
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"<title>.*?</title>", "", svg))


def test_bars_are_as_long_as_their_values() -> None:
    svg = bar_chart([Bar("a", 1.0), Bar("b", 0.5, 0.25, 0.75)], title="t", x_label="x")
    widths = [float(str(one.get("width"))) for one in elements(svg, "rect", "bar")]
    assert widths[1] == pytest.approx(widths[0] / 2, abs=0.11)
    (whisker,) = elements(svg, "line", "error")
    assert float(str(whisker.get("x2"))) - float(str(whisker.get("x1"))) == pytest.approx(widths[0] / 2, abs=0.11)


def test_a_heat_map_shades_shares_and_marks_what_is_right() -> None:
    counts = {"cat": {"cat": 3, "dog": 1}, "dog": {"dog": 2, "nothing": 2}}
    svg = heat_map(counts, title="t", row_label="named", column_label="found", last="nothing")
    cells = elements(svg, "rect", "cell")
    assert len(cells) == 2 * 3  # cat, dog, nothing
    told = {str(cell[0].text): float(str(cell.get("fill-opacity"))) for cell in cells}
    assert told["cat, found cat: 3 of 4"] == pytest.approx(3 * told["cat, found dog: 1 of 4"]) != 0
    assert told["dog, found cat: 0 of 4"] == 0
    right = [str(cell[0].text).split(":")[0] for cell in cells if "right" in str(cell.get("class"))]
    assert right == ["cat, found cat", "dog, found dog"]
