"""The report's figures against the training step: those watched while training, and those of earlier reports here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import user_input
from ldm.evaluation.measurement import Measurement
from ldm.evaluation.page import note, plots
from ldm.evaluation.page_text import Html
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Section
from ldm.evaluation.report_training import Curve
from ldm.files import write_text

HISTORY = "history.jsonl"
Row = dict[str, Any]
"""{"step", "settings": {...}, "figures": {"section/name": [value, low, high]}}."""


def extended_history(out: Path, step: int, settings: Mapping[str, Any], sections: Sequence[Section]) -> list[Row]:
    """The rows of OUT/history.jsonl with this report's, in place of one of the same step and settings."""
    figures = {
        f"{section.name}/{figure.name}": [figure.value, figure.estimate.low, figure.estimate.high]
        for section in sections
        for figure in section.figures
    }
    row: Row = {"step": step, "settings": dict(settings), "figures": figures}
    earlier = [old for old in _read(out / HISTORY) if (old["step"], old["settings"]) != (step, row["settings"])]
    return [*earlier, row]


def write_history(out: Path, rows: Sequence[Row]) -> None:
    """Write them, whole or not at all."""
    write_text(out / HISTORY, "".join(json.dumps(row) + "\n" for row in rows))


def progress_section(
    watched: Mapping[str, Curve], history: Sequence[Row], sections: Sequence[Section]
) -> Section | None:
    """Metric against step; None where nothing was measured at more than one step.

    Of the history only what was measured as in its last row can be compared.
    """
    drawn = [
        line_plot([curve.series("")], title=name.removeprefix("watch/"), x_label="updates", y_label=name, width=360)
        for name, curve in watched.items()
        if len(curve.steps) > 1
    ]
    alike = [row for row in history if row["settings"] == history[-1]["settings"]]
    alike.sort(key=lambda row: row["step"])
    labels = {f"{s.name}/{f.name}": _label(s, f) for s in sections for f in s.figures}
    for key in history[-1]["figures"] if len(alike) > 1 else ():
        rows = [row for row in alike if key in row["figures"]]
        if len(rows) > 1:
            drawn.append(_measured(labels.get(key, key), rows, key))
    if not drawn:
        return None
    words = (
        "While training: the light version of these figures (watch). Points with whiskers: this report and earlier "
        "ones in the same folder with the same settings."
    )
    return Section(name="progress", title="Against the training step", content=Html(plots(*drawn) + note(words)))


def _measured(label: str, rows: Sequence[Row], key: str) -> Html:
    found = [row["figures"][key] for row in rows]
    series = Series(
        label="",
        x=[row["step"] for row in rows],
        y=[value for value, _, _ in found],
        low=[value if low is None else low for value, low, _ in found],
        high=[value if high is None else high for value, _, high in found],
        dots=True,
    )
    return line_plot([series], title=label, x_label="updates", y_label=label, width=360)


def _label(section: Section, figure: Measurement) -> str:
    seen = figure.setting.extractor.split(" at ")[0]
    return f"{figure.label} ({seen})" if section.name.startswith("image_metrics") else figure.label


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with user_input(f"{path}: not a report's history; delete it", OSError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{"step": int(row["step"]), "settings": row["settings"], "figures": row["figures"]} for row in rows]
