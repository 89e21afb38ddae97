"""Several models side by side: the same prompts and seeds, every figure with its interval, clear differences marked."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import Shown, columns, note, paragraph
from ldm.evaluation.page_text import Html, tag
from ldm.evaluation.report import Section, interval_text

ROWS = 16
"""Prompts on the page."""


@dataclass(frozen=True)
class Contender:
    """One of the compared models: its name, and its figures by a key that all share."""

    label: str
    figures: Mapping[str, Measurement]


def apart(first: Measurement, second: Measurement) -> bool:
    """Whether the two intervals do not overlap; without intervals nothing is said to differ."""
    edges = (first.estimate.low, first.estimate.high, second.estimate.low, second.estimate.high)
    if any(edge is None for edge in edges):
        return False
    low, high, other_low, other_high = (float(edge or 0.0) for edge in edges)
    return high < other_low or other_high < low


def best_of(figures: Mapping[str, Measurement]) -> str | None:
    """Which label has the best value; None where neither direction is better."""
    direction = next(iter(figures.values())).better
    if direction == "neither":
        return None
    sign = 1 if direction == "higher" else -1
    return max(figures, key=lambda label: sign * figures[label].value)


def comparison_section(contenders: Sequence[Contender]) -> Section:
    """The table. Green is the best; red is what lies apart from it, interval against interval."""
    keys = list(dict.fromkeys(key for one in contenders for key in one.figures))
    named = [tag("th", one.label, class_="number") for one in contenders]
    head = "".join([tag("th", ""), tag("th", "better"), *named, tag("th", "measured on")])
    rows, values = [], []
    for key in keys:
        figures = {one.label: one.figures[key] for one in contenders if key in one.figures}
        any_figure, best = next(iter(figures.values())), best_of(figures)
        cells = [_cell(figures.get(one.label), figures, best) for one in contenders]
        words = tag("td", _measured_on(any_figure), class_="small")
        arrow = {"lower": "↓", "higher": "↑", "neither": "–"}[any_figure.better]
        rows.append(f"<tr>{tag('td', tag('b', _name(key, any_figure)))}{tag('td', arrow)}{''.join(cells)}{words}</tr>")
        values.append(_values(key, figures, best))
    table = Html(f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>')
    explained = note(
        "The same prompts, seeds, reference and extractor for all. Green: the best value. Red: its 95 % interval does "
        "not overlap the best one's, so the difference is more than chance. What is in neither colour may be as good."
    )
    return Section(
        name="comparison",
        title="Figures side by side",
        content=Html(table + explained),
        values={"figures": values},
        verdict=_verdict(contenders, keys),
    )


def side_by_side_section(
    prompts: Sequence[str], pictures: Mapping[str, Sequence[Image.Image]], flags: Mapping[str, Sequence[str]]
) -> Section:
    """One row a prompt, one column a model; all in a row are drawn from one seed."""
    labels = list(pictures)
    rows = [
        [Shown(pictures[label][i], flag=flags[label][i] if label in flags else "") for label in labels]
        for i in range(len(prompts))
    ]
    told = paragraph("The first prompts, none chosen; the pictures of a row are drawn from the same seed.")
    content = Html(told + columns(rows, labels, prompts))
    return Section(name="side_by_side", title="The same prompts and seeds", content=content)


def _cell(figure: Measurement | None, figures: Mapping[str, Measurement], best: str | None) -> Html:
    if figure is None:
        return tag("td", "–")
    kind = ""
    if best is not None and figure.value == figures[best].value:
        kind = "ok"
    elif best is not None and apart(figure, figures[best]):
        kind = "flag"
    return tag("td", tag("span", interval_text(figure), class_=kind), class_="number")


def _values(key: str, figures: Mapping[str, Measurement], best: str | None) -> dict[str, object]:
    pairs = itertools.combinations(figures, 2)
    return {
        "figure": key,
        "best": best,
        "values": {label: figure.to_json() for label, figure in figures.items()},
        "apart": [[one, other] for one, other in pairs if apart(figures[one], figures[other])],
    }


def _verdict(contenders: Sequence[Contender], keys: Sequence[str]) -> str:
    """For each model, in how many figures it is clearly better than all the others."""
    clear: dict[str, list[str]] = {one.label: [] for one in contenders}
    for key in keys:
        figures = {one.label: one.figures[key] for one in contenders if key in one.figures}
        best = best_of(figures)
        if best is not None and all(apart(figures[best], other) for name, other in figures.items() if name != best):
            clear[best].append(_name(key, figures[best]))
    parts = [f"{label} is clearly best in {', '.join(names)}" for label, names in clear.items() if names]
    return "; ".join(parts) or "no figure tells the best from all others: their intervals overlap"


def _name(key: str, figure: Measurement) -> str:
    """`FID (inception)`: several extractors have one."""
    seen, _, name = key.partition("/")
    return f"{figure.label} ({seen})" if name else figure.label


def _measured_on(figure: Measurement) -> str:
    setting = figure.setting
    count = "" if setting.reference_n is None else f" ({setting.reference_n:,} images)"
    against = "" if setting.reference is None else f", against {setting.reference}{count}"
    warnings = [words for words in figure.estimate.notes if words.startswith("warning")]
    seen = f"n = {setting.n:,}, {setting.resolution} px{against}, {setting.extractor}, resized: {setting.resize_filter}"
    return "; ".join([seen, *warnings])
