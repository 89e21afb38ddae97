"""What was found about the conditions of a model: rates beside their baselines, and the pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from ldm.evaluation.maps import map_picture
from ldm.picture import grid

SHOWN = 8
"""Tasks of each measurement that are kept for the grid."""
_HOLE = (255, 0, 255)  # how a hole is shown in the grid; not a colour of the palette
_T = TypeVar("_T")
Answers = Mapping[str, float | tuple[float, float] | None]
"""Right or wrong, or (value, its own baseline), by the name of the rate; None = the task says nothing."""


@dataclass(frozen=True)
class Rate:
    """A mean over `count` tasks of a number from 0 to 1, beside its baseline."""

    value: float
    baseline: float  # the same with every task judged by the next task's picture, or as the measurement says
    error: float  # standard error of value - baseline
    count: int
    needs: tuple[str, ...]  # the conditions that have to be obeyed to do well

    @property
    def beats_baseline(self) -> bool:
        """Whether the value lies above the baseline by more than three standard errors."""
        return self.value - self.baseline > 3 * self.error


@dataclass(frozen=True)
class Measurement:
    """What was found with some conditions given and the others absent."""

    conditions: tuple[str, ...]
    rates: dict[str, Rate]
    figures: dict[str, float]  # other numbers, explained where they are measured
    shown: tuple[tuple[Image.Image, str], ...]  # pictures and captions, row by row, one column a task
    columns: int

    def as_dict(self) -> dict[str, object]:
        """Numbers only, fit for JSON."""
        rates = {name: asdict(rate) | {"needs": list(rate.needs)} for name, rate in self.rates.items()}
        return {"conditions": list(self.conditions), "rates": rates, "figures": self.figures}

    def summary(self) -> str:
        """`semantic+text: map_iou 0.913 (baseline 0.241), ...`."""
        rates = [f"{name} {rate.value:.3f} (baseline {rate.baseline:.3f})" for name, rate in self.rates.items()]
        figures = [f"{name} {value:.3f}" for name, value in self.figures.items()]
        return f"{'+'.join(self.conditions)}: {', '.join(rates + figures)}"


@dataclass(frozen=True)
class ConditionsReport:
    """All measurements of one drawer, by the conditions that were given: "text", "semantic+text", ..."""

    measurements: dict[str, Measurement]
    count: int
    seed: int
    resolution: int

    def as_dict(self) -> dict[str, object]:
        """Numbers only, fit for JSON."""
        measurements = {name: measurement.as_dict() for name, measurement in self.measurements.items()}
        settings = {"count": self.count, "seed": self.seed, "resolution": self.resolution, "split": "held_out"}
        return {**settings, "measurements": measurements}

    def summary(self) -> str:
        """One line a measurement."""
        return "\n".join(measurement.summary() for measurement in self.measurements.values())

    @property
    def pictures(self) -> Image.Image:
        """A grid: one column a task, one row for each thing given or drawn."""
        cells = [cell for measurement in self.measurements.values() for cell in measurement.shown]
        columns = next(iter(self.measurements.values())).columns
        return grid([picture for picture, _ in cells], [words for _, words in cells], columns)


def rates_of(
    answers: Sequence[_T],
    judge: Callable[[int, _T], Answers],
    default: tuple[str, ...],
    needs: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Rate]:
    """The means of `judge(task, answer)`, beside those with the next task's answer; None = the task says nothing."""
    own = [judge(i, answer) for i, answer in enumerate(answers)]
    shuffled = [judge(i, answers[(i + 1) % len(answers)]) for i in range(len(answers))]
    rates = {}
    for name in own[0]:
        both = [(task[name], other[name]) for task, other in zip(own, shuffled, strict=True) if task[name] is not None]
        if both:
            pairs = [mine if isinstance(mine, tuple) else (mine, theirs) for mine, theirs in both]
            values = np.array(pairs, dtype=np.float64)  # [tasks, 2]
            value, baseline = values.mean(axis=0).tolist()
            error = float((values[:, 0] - values[:, 1]).std() / math.sqrt(len(values)))
            rates[name] = Rate(value, baseline, error, len(values), (needs or {}).get(name, default))
    return rates


Row = tuple[Sequence[Image.Image], Sequence[str]]  # pictures and captions, one for each task


def measurement_of(
    conditions: tuple[str, ...], rates: dict[str, Rate], rows: Sequence[Row], figures: dict[str, float] | None = None
) -> Measurement:
    """The measurement with its first `SHOWN` tasks, every row captioned by the conditions."""
    columns = min(SHOWN, len(rows[0][0]))
    name = "+".join(conditions)
    shown = [
        (picture, f"[{name}] {words}")
        for pictures, captions in rows
        for picture, words in list(zip(pictures, captions, strict=True))[:columns]
    ]
    return Measurement(conditions, rates, figures or {}, tuple(shown), columns)


def coloured_maps(maps: Sequence[Image.Image]) -> list[Image.Image]:
    """Index maps as RGB pictures."""
    return [map_picture(indices) for indices in maps]


def map_rows(
    maps: Sequence[Image.Image], drawn: Sequence[Image.Image], captions: Sequence[str] | None = None
) -> list[Row]:
    """Maps above what was drawn from them."""
    return [(coloured_maps(maps), ["map"] * len(maps)), (drawn, captions or ["drawn"] * len(maps))]


def hole_rows(
    given: Sequence[Image.Image],
    masks: Sequence[Image.Image],
    drawn: Sequence[Image.Image],
    captions: Sequence[str] | None = None,
) -> list[Row]:
    """Pictures with their holes above what was drawn."""
    holed = [Image.composite(Image.new("RGB", m.size, _HOLE), i, m) for i, m in zip(given, masks, strict=True)]
    return [(holed, ["given"] * len(holed)), (drawn, captions or ["drawn"] * len(holed))]
