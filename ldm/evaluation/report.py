"""A report: sections with figures, plots and pictures, written as metrics.json and one page. What cannot be made is a
line in its place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import missing, note, page, table
from ldm.evaluation.page_text import EMPTY, Html, tag
from ldm.files import write_text

FORMAT = 1
"""Of metrics.json; raised when a key changes its meaning."""
METRICS, PAGE = "metrics.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report. Without content it is only figures for metrics.json."""

    name: str
    """Key in metrics.json and anchor of the page."""
    title: str
    content: Html = EMPTY
    verdict: str = ""
    """What a reader in a hurry needs of it; "" = nothing."""
    figures: tuple[Measurement, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    """Further numbers for metrics.json."""
    missing: str = ""
    """Why the section could not be made and how to mend that; "" = it was made."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All sections of one model, and how they were made."""

    title: str
    subtitle: str
    settings: Mapping[str, Any]
    sections: tuple[Section, ...]

    def to_json(self) -> dict[str, Any]:
        """Settings, every figure with its interval and setting, each section's further values, what is missing."""
        figures = [{"section": s.name, **figure.to_json()} for s in self.sections for figure in s.figures]
        return {
            "format": FORMAT,
            **self.settings,
            "verdicts": {section.name: section.verdict for section in self.sections if section.verdict},
            "figures": figures,
            "missing": {section.name: section.missing for section in self.sections if section.missing},
            **{section.name: dict(section.values) for section in self.sections if section.values},
        }

    def to_html(self) -> str:
        """The page."""
        shown = [s for s in self.sections if s.content or s.missing]
        parts = [(s.name, s.title, missing(s.title, s.missing) if s.missing else s.content) for s in shown]
        verdicts = [(s.title, s.verdict) for s in self.sections if s.verdict]
        return page(self.title, self.subtitle, verdicts, [*parts, ("settings", "How it was made", self._settings())])

    def write(self, out: Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write OUT/metrics.json and OUT/report.html, each whole or not at all; `extra` joins the former."""
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / METRICS, to_json({**self.to_json(), **(extra or {})}))
        write_text(out / PAGE, self.to_html())

    def _settings(self) -> Html:
        return table(("setting", "value"), [(name.replace("_", " "), _told(v)) for name, v in self.settings.items()])


def attempt(name: str, title: str, make: Callable[[], Section]) -> Section:
    """The section, or one that says in a line what it would need: the rest of the report is still made."""
    try:
        return make()
    except UserError as error:
        return Section(name=name, title=title, missing=" ".join(str(error).split()))


def figures_table(figures: Sequence[Measurement]) -> Html:
    """Every figure with its interval and all that it must not be quoted without; what all share is told once, below."""
    settings = [_setting_words(figure) for figure in figures]
    shared = {name: words for name, words in settings[0].items() if all(one[name] == words for one in settings)}
    apart = [name for name in settings[0] if name not in shared]
    notes = any(figure.estimate.notes for figure in figures)
    rows = []
    for figure, setting in zip(figures, settings, strict=True):
        estimate = figure.estimate
        interval = "–" if estimate.low is None or estimate.high is None else f"{estimate.low:.4g} … {estimate.high:.4g}"
        arrow = {"lower": "↓ lower", "higher": "↑ higher", "neither": "–"}[figure.better]
        cells = [
            tag("td", tag("b", figure.label)),
            tag("td", f"{estimate.value:.4g} {figure.unit}".strip(), class_="number value"),
            tag("td", interval, class_="number"),
            tag("td", arrow, class_="tight"),
            *(tag("td", setting[name], class_="small") for name in apart),
            *([tag("td", "; ".join(estimate.notes), class_="words")] if notes else []),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    numbers = [tag("th", word, class_="number") for word in ("value", "95 % interval")]
    heads = [tag("th", ""), *numbers, *(tag("th", word) for word in ("better", *apart, *["to know"] * notes))]
    below = note("; ".join(f"{name}: {words}" for name, words in shared.items()))
    return Html(f'<div class="scroll"><table><tr>{"".join(heads)}</tr>{"".join(rows)}</table></div>{below}')


def _setting_words(figure: Measurement) -> dict[str, str]:
    setting = figure.setting
    count = "" if setting.reference_n is None else f" ({setting.reference_n:,} images)"
    return {
        "n": f"{setting.n:,}",
        "reference": "–" if setting.reference is None else f"{setting.reference}{count}",
        "px": str(setting.resolution),
        "seen through": setting.extractor,
        "resized": setting.resize_filter,
    }


def to_json(values: Any) -> str:
    """JSON that every reader takes: what is not finite is null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def interval_text(figure: Measurement) -> str:
    """`12.3 [11.8, 12.9]`, with the unit if there is one."""
    return estimate_text(figure.value, figure.estimate.low, figure.estimate.high, figure.unit)


def estimate_text(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A value with its interval, four digits."""
    interval = "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"
    return f"{value:.4g}{f' {unit}' if unit else ''}{interval}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_told, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
