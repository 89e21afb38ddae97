"""The report's part on training: loss curves of metrics.jsonl, and every figure that was measured at several steps."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError, user_input
from ldm.evaluation.page import note, plots
from ldm.evaluation.page_text import Html
from ldm.evaluation.plots import Series, line_plot
from ldm.evaluation.report import Section, attempt

METRICS_LOG = "metrics.jsonl"
MOST_POINTS = 300
"""Points of a curve; of more, runs of neighbours are averaged."""


@dataclass(frozen=True)
class Curve:
    """One number of a training log, by the number of updates done."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def series(self, label: str) -> Series:
        """The curve as it is drawn: at most `MOST_POINTS` points, with the range that each was averaged over."""
        size = math.ceil(len(self.steps) / MOST_POINTS)
        if size == 1:
            few = len(self.steps) <= 40
            return Series(label=label, x=self.steps, y=self.values, dots=few)
        parts = [slice(first, first + size) for first in range(0, len(self.steps), size)]
        finite = [[v for v in self.values[part] if math.isfinite(v)] or [math.nan] for part in parts]
        return Series(
            label=label,
            x=[sum(self.steps[part]) / len(self.steps[part]) for part in parts],
            y=[sum(values) / len(values) for values in finite],
            low=[min(values) for values in finite],
            high=[max(values) for values in finite],
        )


def read_curves(run: Path) -> dict[str, Curve]:
    """Every number of a run's log by its name. Raises `UserError` if there is no log; a line cut short is left out."""
    path = run / METRICS_LOG
    if not path.is_file():
        raise UserError(f"{path}: found no training log; it is in the folder of a run, which --data does not replace")
    points: dict[str, dict[int, float]] = {}
    with user_input(str(path), OSError, UnicodeDecodeError):
        lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = _row(line)
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, {})[int(row["step"]) + 1] = float(value)
    return {name: Curve(name, tuple(sorted(at)), tuple(at[step] for step in sorted(at))) for name, at in points.items()}


def run_sections(run: Path) -> tuple[list[Section], dict[str, Curve]]:
    """The section on the training of `run` and its curves; nothing for what is no run."""
    if not (run / METRICS_LOG).is_file():
        return [], {}
    curves: dict[str, Curve] = {}

    def read() -> Section:
        curves.update(read_curves(run))
        return training_section(curves)

    return [attempt("training", "Training", read)], curves


def training_section(curves: Mapping[str, Curve]) -> Section:
    """Loss, the rest of the loss's terms, and what was measured while training. Raises `UserError` for an empty log."""
    return compared_training_section({"": curves})


def compared_training_section(runs: Mapping[str, Mapping[str, Curve]]) -> Section:
    """The curves of several runs laid over each other; `runs` by label, "" for a single one."""
    names = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    if not names:
        raise UserError(f"{METRICS_LOG}: found no row; allowed is the log of a run that has done a step")
    drawn = []
    for group in _groups(names):
        series = [
            curves[name].series(_label(run, name, group))
            for name in group
            for run, curves in runs.items()
            if name in curves and any(map(math.isfinite, curves[name].values))
        ]
        if series:
            title = group[0] if len(group) == 1 else "loss"
            drawn.append(line_plot(series, title=title, x_label="updates", y_label=title, log_y="loss" in title))
    last = {f"{run} {name}".strip(): curves[name].values[-1] for run, curves in runs.items() for name in curves}
    words = "Curves of many updates are averaged over neighbours; the band is the range of what was averaged."
    return Section(name="training", title="Training", content=Html(plots(*drawn) + note(words)), values={"last": last})


def _groups(names: Sequence[str]) -> list[list[str]]:
    """Which curves share a plot: the loss with that of validation; all else has one of its own."""
    together = [name for name in ("loss", "validation/loss") if name in names]
    alone = [name for name in names if name not in together]
    alone.sort(key=lambda name: (not name.startswith("watch/"), not name.startswith("validation/")))
    return [*([together] if together else []), *([name] for name in alone)]


def _label(run: str, name: str, group: Sequence[str]) -> str:
    kind = {"loss": "training", "validation/loss": "validation"}.get(name, name) if len(group) > 1 else ""
    return f"{run} {kind}".strip()


def _row(line: str) -> dict[str, float]:
    """A row of the log; {} for a line that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}
