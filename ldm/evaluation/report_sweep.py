"""The report's guidance sweep: quality and agreement with the prompt, against the guidance scale and each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import note, plots, table
from ldm.evaluation.page_text import Html
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Section, interval_text


@dataclass(frozen=True)
class SweepPoint:
    """What was measured at one guidance scale, by name: `fid`, and what else there is."""

    scale: float
    figures: Mapping[str, Measurement]


def sweep_section(points: Sequence[SweepPoint], agreement: str | None) -> Section:
    """FID and the figure called `agreement` against the scale, and FID against that figure."""
    points = sorted(points, key=lambda point: point.scale)
    names = [name for name in ("fid", agreement) if name is not None]
    drawn = [_against_scale(points, name) for name in names]
    if agreement is not None and len(points) > 1:
        drawn.append(_trade_off(points, agreement))
    first = points[0].figures["fid"].setting
    rows = [(f"{point.scale:g}", *(interval_text(point.figures[name]) for name in names)) for point in points]
    heads = ("guidance scale", *(points[0].figures[name].label for name in names))
    told = (
        f"The same {first.n} prompts and seeds at every scale; FID through {first.extractor}, against "
        f"{first.reference} ({first.reference_n} images). At this n compare the scales with each other only."
    )
    best = min(points, key=lambda point: point.figures["fid"].value)
    words = f"FID is lowest at guidance {best.scale:g} ({interval_text(best.figures['fid'])}, n = {first.n})"
    if agreement is not None:
        most = max(points, key=lambda point: point.figures[agreement].value)
        figure = most.figures[agreement]
        words += f"; {figure.label} highest at {most.scale:g} ({interval_text(figure)})"
    values = [
        {"guidance": p.scale, **{name: _plain(p.figures[name]) for name in names}} for p in points
    ]  # fmt: skip
    return Section(
        name="guidance_sweep",
        title="Guidance sweep",
        content=Html(plots(*drawn) + table(heads, rows, numbers=range(len(heads))) + note(told)),
        values={"points": values},
        verdict=words,
    )


def _against_scale(points: Sequence[SweepPoint], name: str) -> Html:
    figures = [point.figures[name] for point in points]
    series = Series(
        label="",
        x=[point.scale for point in points],
        y=[figure.value for figure in figures],
        low=[_edge(figure, 0) for figure in figures],
        high=[_edge(figure, 1) for figure in figures],
        dots=True,
    )
    label = figures[0].label
    return line_plot([series], title=f"{label} against guidance", x_label="guidance scale", y_label=label, width=360)


def _trade_off(points: Sequence[SweepPoint], agreement: str) -> Html:
    series = Series(
        label="",
        x=[point.figures[agreement].value for point in points],
        y=[point.figures["fid"].value for point in points],
        dots=True,
        names=[f"{point.scale:g}" for point in points],
    )
    label = points[0].figures[agreement].label
    return line_plot([series], title=f"FID against {label}, by scale", x_label=label, y_label="FID", width=360)


def _edge(figure: Measurement, which: int) -> float:
    edge = (figure.estimate.low, figure.estimate.high)[which]
    return figure.value if edge is None else edge


def _plain(figure: Measurement) -> dict[str, object]:
    return {"value": figure.value, "interval": [figure.estimate.low, figure.estimate.high]}
