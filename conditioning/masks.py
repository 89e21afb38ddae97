"""Mask generators for inpainting: strokes, boxes, half planes, objects. 1 = repaint.

Every mask is float32 [1, H, W] in {0, 1} and a function of the (CPU) generator's state alone; every one but the full
mask has pixels of both kinds. All but the full mask raise ValueError if a side is below 3 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from conditioning.class_file import UNKNOWN_CLASS

MaskSize = Literal["thin", "medium", "large"]


@dataclass(frozen=True)
class Brush:
    """Least and most of each kind, in pixels of a 256 px image."""

    stroke_share: float
    """Of the mixture; the others are boxes."""
    strokes: tuple[int, int]
    length: tuple[int, int]
    width: tuple[int, int]
    boxes: tuple[int, int] = (1, 4)
    side: tuple[int, int] = (30, 150)
    margin: int = 10


BRUSHES: dict[MaskSize, Brush] = {
    "thin": Brush(1.0, strokes=(4, 20), length=(10, 50), width=(5, 15)),
    "medium": Brush(1 / 1.3, strokes=(4, 5), length=(10, 110), width=(5, 55), boxes=(1, 5), side=(10, 50), margin=1),
    "large": Brush(0.5, strokes=(1, 5), length=(10, 210), width=(5, 105)),
}
"""LaMa (arXiv 2109.07161): `large` are the masks it trains on, `medium` those of its test set of that name. Its thin
test set has 4 to 50 strokes, which cover more than `medium` does; up to 20 keep the order of the names."""
_SEGMENTS = (1, 5)
_TRIES = 10

LEAST_OBJECT, MOST_OBJECT = 0.002, 0.5
"""Shares of the image: a class that covers less is hard to see, one that covers more is a background."""
MOST_GROWTH = 1 / 16
"""Object masks grow by up to this share of the image's side, so that their outline does not give the object away."""


def stroke_mask(height: int, width: int, generator: torch.Generator, size: MaskSize = "large") -> Tensor:
    """Strokes of 1 to 5 straight segments, each with its own length, direction and width: float32 [1, H, W]."""
    brush, scale = BRUSHES[size], _scale(height, width)

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        for _ in range(_whole(brush.strokes, *uniform(generator, 1))):
            across, down, segments = uniform(generator, 3)
            x, y = int(across * width), int(down * height)
            canvas.point((x, y), fill=1)  # the thinnest and shortest stroke leaves a mark too
            for _ in range(_whole(_SEGMENTS, segments)):
                turn, long, thick = uniform(generator, 3)
                length = _whole(brush.length, long) * scale
                end_x = min(max(round(x + length * math.cos(math.tau * turn)), 0), width - 1)
                end_y = min(max(round(y + length * math.sin(math.tau * turn)), 0), height - 1)
                _segment(canvas, (x, y), (end_x, end_y), max(1, round(_whole(brush.width, thick) * scale)))
                x, y = end_x, end_y

    return _drawn(draw, height, width, generator)


def box_mask(height: int, width: int, generator: torch.Generator, size: MaskSize = "large") -> Tensor:
    """Upright boxes that keep a margin of a pixel or more from the border: float32 [1, H, W]."""
    brush, scale = BRUSHES[size], _scale(height, width)

    def span(length: int, side: float, place: float) -> tuple[int, int]:
        margin = min(max(1, round(brush.margin * scale)), (length - 1) // 2)
        free = length - 2 * margin
        pixels = min(max(1, round(_whole(brush.side, side) * scale)), free)
        start = margin + int(place * (free - pixels + 1))
        return start, start + pixels - 1

    def draw(canvas: ImageDraw.ImageDraw) -> None:
        for _ in range(_whole(brush.boxes, *uniform(generator, 1))):
            side_x, side_y, place_x, place_y = uniform(generator, 4)
            (left, right), (top, bottom) = span(width, side_x, place_x), span(height, side_y, place_y)
            canvas.rectangle((left, top, right, bottom), fill=1)

    return _drawn(draw, height, width, generator)


def half_plane_mask(height: int, width: int, generator: torch.Generator) -> Tensor:
    """All on one side of a line, float32 [1, H, W]; half of the lines are upright or level, as for outpainting.

    The line cuts the image's extent across it at 20 to 80 %.
    """
    _check_size(height, width)
    upright, turn, place = uniform(generator, 3)
    quarter = int(turn * 4)
    angle = quarter * math.pi / 2 if upright < 0.5 else math.tau * turn
    along_x, along_y = round(math.cos(angle), 9), round(math.sin(angle), 9)
    distance = np.arange(width) * along_x + np.arange(height)[:, None] * along_y  # [H, W]
    low, high = float(distance.min()), float(distance.max())
    return _tensor(distance > low + (0.2 + 0.6 * place) * (high - low))


def object_mask(semantic: Tensor, generator: torch.Generator) -> Tensor | None:
    """A mask over one class of the map `semantic` int64 [H, W]: float32 [1, H, W], or None if there is no object.

    An object is a class, but not 255, that covers LEAST_OBJECT to MOST_OBJECT of the image; each is as likely. Half of
    the masks follow its outline, half are its bounding box; both are grown by up to MOST_GROWTH, unless nothing of the
    image were left.
    """
    height, width = semantic.shape
    _check_size(height, width)
    classes = semantic.cpu().numpy()
    counts = np.bincount(classes.reshape(-1), minlength=UNKNOWN_CLASS + 1)
    counts[UNKNOWN_CLASS] = 0
    (objects,) = np.nonzero((counts >= max(1, LEAST_OBJECT * classes.size)) & (counts <= MOST_OBJECT * classes.size))
    which, box, growth = uniform(generator, 3)
    if not len(objects):
        return None
    silhouette = classes == objects[int(which * len(objects))]  # [H, W]
    mask = _grown(silhouette, int(growth * (MOST_GROWTH * math.sqrt(height * width) + 1)))
    if box < 0.5:
        mask = np.logical_and(mask.any(axis=1, keepdims=True), mask.any(axis=0, keepdims=True))
    return _tensor(silhouette if mask.all() else mask)


def full_mask(height: int, width: int) -> Tensor:
    """Everything is to be painted: ones, float32 [1, H, W]."""
    return torch.ones(1, height, width)


def uniform(generator: torch.Generator, count: int) -> list[float]:
    """As many numbers in [0, 1)."""
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


def _whole(limits: tuple[int, int], place: float) -> int:
    """A whole number within the limits (both included), each as likely as the others."""
    low, high = limits
    return low + int(place * (high - low + 1))


def _scale(height: int, width: int) -> float:
    """Pixels per pixel of a 256 px image of the same area."""
    _check_size(height, width)
    return math.sqrt(height * width) / 256


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 3:
        raise ValueError(f"mask: found {height} x {width} pixels; allowed is 3 or more each way; use larger images")


def _segment(canvas: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], thick: int) -> None:
    """A line with round ends."""
    canvas.line((start, end), fill=1, width=thick)
    radius = (thick - 1) / 2
    for x, y in (start, end) if thick > 2 else ():
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def _drawn(draw: Callable[[ImageDraw.ImageDraw], None], height: int, width: int, generator: torch.Generator) -> Tensor:
    """What `draw` draws; again if it covers everything, and at last a half plane."""
    for _ in range(_TRIES):
        image = Image.new("L", (width, height))
        draw(ImageDraw.Draw(image))
        pixels = np.asarray(image)
        if not pixels.all():
            return _tensor(pixels)
    return half_plane_mask(height, width, generator)


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """The mask bool [H, W] grown by `radius` pixels in each direction, corners too."""
    for axis in (0, 1):
        done = 0
        while done < radius:
            step = min(2 * done + 1, radius - done)  # shifting by more would leave gaps
            along = np.moveaxis(mask, axis, 0)
            grown = along.copy()
            grown[step:] |= along[:-step]
            grown[:-step] |= along[step:]
            mask = np.moveaxis(grown, 0, axis)
            done += step
    return mask


def _tensor(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(mask.astype(np.float32))[None]  # [1, H, W]
