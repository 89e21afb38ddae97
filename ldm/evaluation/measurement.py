"""One figure with all that it needs to be compared: interval, number of images, reference, extractor, resizing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from ldm.errors import UserError

Better = Literal["lower", "higher", "neither"]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where there is none. `notes` say what a reader must know."""

    value: float
    low: float | None = None
    high: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a figure was measured on and with. The same images score otherwise in another setting."""

    n: int
    """Images (or pairs) measured."""
    resolution: int
    """Their side in pixels."""
    extractor: str
    """Name and weights of the network whose features are compared, such as `inception-v3 (6726825d...)`."""
    resize_filter: str
    """How images were brought to the extractor's side."""
    reference: str | None = None
    """What they are compared with; None where nothing is."""
    reference_n: int | None = None


@dataclass(frozen=True)
class Measurement:
    """A figure of a report. `name` is its key in metrics.json, `label` what a reader sees."""

    name: str
    label: str
    better: Better
    estimate: Estimate
    setting: Setting
    unit: str = ""

    @property
    def value(self) -> float:
        """The figure itself."""
        return self.estimate.value

    def line(self) -> str:
        """`FID 12.3 [11.8, 12.9]; n = 500, 64 px, against ...`: nothing is left to guess."""
        estimate, setting = self.estimate, self.setting
        unit = f" {self.unit}" if self.unit else ""
        interval = "" if estimate.low is None else f" [{estimate.low:.4g}, {estimate.high:.4g}]"
        against = ""
        if setting.reference is not None:
            count = "" if setting.reference_n is None else f" ({setting.reference_n} images)"
            against = f", against {setting.reference}{count}"
        images = f"n = {setting.n}, {setting.resolution} px{against}"
        seen = f"{images}, {setting.extractor}, resized: {setting.resize_filter}"
        return "; ".join([f"{self.label} {estimate.value:.4g}{unit}{interval}", seen, *estimate.notes])

    def to_json(self) -> dict[str, object]:
        """All of it, flat but for the setting."""
        estimate = self.estimate
        interval = None if estimate.low is None else [estimate.low, estimate.high]
        return {
            "name": self.name,
            "label": self.label,
            "value": estimate.value,
            "interval": interval,
            "unit": self.unit,
            "better": self.better,
            "notes": list(estimate.notes),
            **asdict(self.setting),
        }


def check_count(what: str, count: int, least: int, metric: str) -> None:
    """Raise `UserError` unless there are at least `least` images for `metric`."""
    if count < least:
        images = "image" if count == 1 else "images"
        raise UserError(f"{metric}: found {count} {images} in the {what}; allowed is {least} or more; give more images")
