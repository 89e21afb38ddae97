"""Line plots as inline SVG: axes with ticks and labels, legends, confidence bands. Colours are the page's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ldm.evaluation.page_text import Html, escaped

_T = TypeVar("_T")
COLOURS = 8
"""Classes s0 .. s7 of the page's style; further series repeat them."""
LARGEST = 1e100
"""Larger numbers are as good as infinite."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 22, 34, 46


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. Points that are not finite leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower and upper edge of a band round the line, both or none."""
    high: Sequence[float] | None = None
    dots: bool = False
    """Mark every point: few and measured apart, rather than a curve."""
    names: Sequence[str] | None = None
    """Words beside the points."""


@dataclass(frozen=True)
class Axis:
    """A range of values laid over pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """The pixel of a value; what lies outside the range is put on its edge."""
        low, high, value = (self._scaled(number) for number in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the range."""
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value


def line_plot(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    width: int = 560,
    height: int = 300,
) -> Html:
    """An SVG element. `log_y` is used only if every value is above 0. Raises ValueError where nothing is finite."""
    usable = [one for one in series if any(map(_finite, one.x, one.y))]
    if not usable:
        raise ValueError("found no finite point; allowed is one or more")
    xs = [x for one in usable for x, y in zip(one.x, one.y, strict=True) if _finite(x, y)]
    ys = [y for one in usable for y in [*one.y, *(one.low or ()), *(one.high or ())] if abs(y) < LARGEST]
    log_y = log_y and min(ys) > 0
    margin = 0.04 if any(one.dots or one.names for one in usable) else 0.0
    x_axis = Axis(*_with_room(min(xs), max(xs), margin), _LEFT, width - _RIGHT)
    room = _log_room(min(ys), max(ys)) if log_y else _with_room(min(ys), max(ys), 0.06)
    y_axis = Axis(*room, height - _BOTTOM, _TOP, log_y)
    parts = [_frame(x_axis, y_axis, x_label, y_label, width, height)]
    parts += [_band(one, number, x_axis, y_axis) for number, one in enumerate(usable) if one.low is not None]
    parts += [_line(one, number, x_axis, y_axis) for number, one in enumerate(usable)]
    if len(usable) > 1 or usable[0].label:
        parts.append(_legend([one.label for one in usable], width))
    return svg("".join(parts), title, width, height)


def svg(content: str, title: str, width: int, height: int) -> Html:
    """An SVG element that shrinks with the page, under a title that is read aloud too."""
    words = escaped(title)
    size = f"max-width:{width}px;flex-basis:{0.9 * width:.0f}px"
    return Html(
        f'<svg class="plot" role="img" aria-label="{words}" viewBox="0 0 {width} {height}" style="{size}">'
        f'<text class="title" x="{_LEFT}" y="16">{words}</text>{content}</svg>'
    )


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside low..high, about `count` of them."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / rough))) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside low..high; over less than two of them also 2 and 5 times, over many not every one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    stride = max(1, (last - first) // 6)
    values = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [value for value in values if low <= value <= high]


def tick_text(value: float) -> str:
    """`0.05`, `20k`, `1e-06`: short enough for an axis."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1_000_000 else f"{value:.3g}"
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str, width: int, height: int) -> str:
    parts = []
    for value in y_axis.ticks(5):
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{x_axis.start:.1f}" x2="{x_axis.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{x_axis.start - 6:.1f}" y="{y + 4:.1f}">{tick_text(value)}</text>')
    bottom = y_axis.start
    for value in x_axis.ticks(7):
        x = x_axis.place(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 17:.1f}">{tick_text(value)}</text>')
    edges = f'x1="{x_axis.start:.1f}" x2="{x_axis.end:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}"'
    parts.append(f'<line class="axis" {edges}/>')
    middle = (x_axis.start + x_axis.end) / 2
    parts.append(f'<text class="label middle" x="{middle:.1f}" y="{height - 8}">{escaped(x_label)}</text>')
    across = (y_axis.start + y_axis.end) / 2
    turned = f'transform="translate(13 {across:.1f}) rotate(-90)"'
    parts.append(f'<text class="label middle" {turned}>{escaped(y_label)}</text>')
    return "".join(parts)


def _line(one: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
    colour, parts = f"s{number % COLOURS}", []
    points = [(x_axis.place(x), y_axis.place(y)) if _finite(x, y) else None for x, y in zip(one.x, one.y, strict=True)]
    for run in _runs(points):
        if len(run) > 1:
            parts.append(f'<polyline class="line {colour}" points="{_points(run)}"/>')
    alone = {run[0] for run in _runs(points) if len(run) == 1}
    for i, point in enumerate(points):
        if point is None:
            continue
        if one.dots or point in alone:
            told = escaped(f"{one.label} {one.x[i]:.6g}: {one.y[i]:.6g}".strip())
            circle = f'<circle class="dot {colour}" cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3.5">'
            parts.append(f"{circle}<title>{told}</title></circle>")
        if one.names is not None:
            place = f'x="{point[0] + 6:.1f}" y="{point[1] - 6:.1f}"'
            parts.append(f'<text class="tick" {place}>{escaped(one.names[i])}</text>')
    return "".join(parts)


def _band(one: Series, number: int, x_axis: Axis, y_axis: Axis) -> str:
    if one.low is None or one.high is None:
        return ""
    edges = [
        (x_axis.place(x), y_axis.place(low), y_axis.place(high)) if _finite(x, low) and _finite(x, high) else None
        for x, low, high in zip(one.x, one.low, one.high, strict=True)
    ]
    shapes = []
    for run in _runs(edges):
        outline = [(x, high) for x, _, high in run] + [(x, low) for x, low, _ in reversed(run)]
        if len(run) > 1:
            shapes.append(f'<polygon class="band s{number % COLOURS}" points="{_points(outline)}"/>')
        else:
            x, low, high = run[0]
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
            shapes.append(f'<line class="whisker s{number % COLOURS}" {ends}/>')
    return "".join(shapes)


def _legend(labels: Sequence[str], width: int) -> str:
    parts, x, y = [], float(_LEFT), 29.0
    for number, label in enumerate(labels):
        step = 30 + 6.2 * len(label)
        if x > _LEFT and x + step > width:
            x, y = float(_LEFT), y + 13
        parts.append(f'<line class="line s{number % COLOURS}" x1="{x}" x2="{x + 16}" y1="{y - 4}" y2="{y - 4}"/>')
        parts.append(f'<text class="tick" x="{x + 20:.1f}" y="{y}">{escaped(label)}</text>')
        x += step
    return "".join(parts)


def _runs(points: Sequence[_T | None]) -> list[list[_T]]:
    """The points between gaps."""
    runs: list[list[_T]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _points(run: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in run)


def _finite(x: float, y: float) -> bool:
    return abs(x) < LARGEST and abs(y) < LARGEST  # False for NaN


def _with_room(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a margin; of a single value something round it."""
    most = max(abs(low), abs(high))
    if high - low <= max(1e-9 * most, 1 / LARGEST):
        reach = most / 2 if most > 1 / LARGEST else 0.5
        return low - reach, high + reach
    margin = share * (high - low)
    return low - margin, high + margin


def _log_room(low: float, high: float) -> tuple[float, float]:
    return low / 1.1, high * 1.1
