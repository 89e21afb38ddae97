"""Bars and heat maps as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldm.evaluation.page_text import Html, escaped
from ldm.evaluation.plots import Axis, linear_ticks, svg, tick_text

MOST_CLASSES = 24
"""Rows and columns of a heat map that can still be read."""


@dataclass(frozen=True)
class Bar:
    """A value, and its interval if there is one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(bars: Sequence[Bar], *, title: str, x_label: str, width: int = 560, largest: float | None = None) -> Html:
    """Horizontal bars from 0, each with its value and a whisker for its interval.

    `largest` is where the axis ends, by default the greatest value. Values below 0 are shown as 0, with their number.
    Raises ValueError without a finite value.
    """
    finite = [bar for bar in bars if math.isfinite(bar.value)]
    if not finite:
        raise ValueError("found no finite value; allowed is one or more")
    most = largest or max(max(bar.value, bar.high or 0.0) for bar in finite)
    left = 20 + 6.4 * min(32, max(len(bar.label) for bar in finite))
    axis = Axis(0.0, most if most > 0 else 1.0, left, width - 60)
    top, step = 30.0, 24.0
    bottom = top + step * len(finite)
    parts = []
    for value in linear_ticks(axis.low, axis.high, 5):
        x = axis.place(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{bottom + 14}">{tick_text(value)}</text>')
    for number, bar in enumerate(finite):
        parts.append(_bar(bar, axis, top + step * number + step / 2))
    middle = f'x="{(axis.start + axis.end) / 2:.1f}" y="{bottom + 32}"'
    parts.append(f'<text class="label middle" {middle}>{escaped(x_label)}</text>')
    return svg("".join(parts), title, width, int(bottom + 40))


def _bar(bar: Bar, axis: Axis, y: float) -> str:
    end = axis.place(bar.value)
    words = escaped(bar.label if len(bar.label) <= 32 else bar.label[:31] + "…")
    parts = [
        f'<text class="tick end" x="{axis.start - 6:.1f}" y="{y + 4:.1f}">{words}</text>',
        f'<rect class="bar s0" x="{axis.start:.1f}" y="{y - 7:.1f}" width="{end - axis.start:.1f}" height="14"/>',
    ]
    edge = end
    if bar.low is not None and bar.high is not None:
        low, edge = axis.place(bar.low), axis.place(bar.high)
        parts.append(f'<line class="error" x1="{low:.1f}" x2="{edge:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
    edge = max(edge, end)
    parts.append(f'<text class="tick" x="{edge + 6:.1f}" y="{y + 4:.1f}">{bar.value:.3g}</text>')
    return "".join(parts)


def heat_map(
    counts: Mapping[str, Mapping[str, int]], *, title: str, row_label: str, column_label: str, last: str = ""
) -> Html:
    """`counts[row][column]` as squares, each shaded by its share of the row; the diagonal is what is right.

    Columns are the rows' names and whatever else was found, `last` at the end. Of more than `MOST_CLASSES` rows those
    with most mistakes are shown. Raises ValueError without rows.
    """
    if not counts:
        raise ValueError("found no rows; allowed is one or more")
    rows = sorted(counts, key=lambda row: sum(n for name, n in counts[row].items() if name != row), reverse=True)
    rows = sorted(rows[:MOST_CLASSES])
    found = sorted({name for row in rows for name, n in counts[row].items() if n} - {*rows, last})
    columns = [*rows, *found[: MOST_CLASSES - 4], *([last] if last else [])]
    cell = 34 if len(columns) <= 12 else 24
    left = 30 + 6.4 * max(map(len, rows))
    top = 44 + 5.0 * max(map(len, columns))
    parts = [f'<text class="label" x="{left}" y="36">{escaped(column_label)}</text>']
    for number, name in enumerate(columns):
        place = f"translate({left + cell * (number + 0.6):.1f} {top - 6:.1f}) rotate(-50)"
        parts.append(f'<text class="tick" transform="{place}">{escaped(name)}</text>')
    for number, name in enumerate(rows):
        y = top + cell * number
        parts.append(f'<text class="tick end" x="{left - 6:.1f}" y="{y + cell / 2 + 4:.1f}">{escaped(name)}</text>')
        parts += [
            _cell(counts[name].get(other, 0), sum(counts[name].values()), name, other, left + cell * i, y, cell)
            for i, other in enumerate(columns)
        ]
    # Of few rows the turned label is longer than they are: it ends where they end.
    middle = top + cell * len(rows) - max(cell * len(rows), 6.0 * len(row_label)) / 2
    turned = f'transform="translate(13 {middle:.1f}) rotate(-90)"'
    parts.append(f'<text class="label middle" {turned}>{escaped(row_label)}</text>')
    width, height = int(left + cell * len(columns) + 40), int(top + cell * len(rows) + 12)
    return svg("".join(parts), title, max(width, 320), height)


def _cell(count: int, total: int, row: str, column: str, x: float, y: float, side: float) -> str:
    kind = "right" if row == column else "wrong"
    share = count / total if total else 0.0
    box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{side - 2}" height="{side - 2}"'
    told = escaped(f"{row}, found {column}: {count} of {total}")
    square = f'<rect class="cell {kind}" fill-opacity="{0.7 * share:.3f}" {box}><title>{told}</title></rect>'
    words = f'<text class="count middle" x="{x + side / 2:.1f}" y="{y + side / 2 + 4:.1f}">{count}</text>'
    return square + (words if count else "")
