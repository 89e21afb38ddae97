"""A sample to tensors of one size: cropped to a square, resized, perhaps flipped; maps and masks follow the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.images import to_tensor
from ldm.data.sample import Sample

if TYPE_CHECKING:
    from ldm.data.sources import DataConfig


@dataclass(frozen=True)
class Transformed:
    """Tensors of one sample. What the sample does not have is None."""

    image: Tensor | None
    """float32 [3, R, R] in [-1, 1]."""
    semantic: Tensor | None
    """int64 [R, R], 255 = unknown."""
    mask: Tensor | None
    """float32 [1, R, R] in [0, 1], 1 = repaint."""


@dataclass(frozen=True)
class Geometry:
    """Where the square is cut (0 = left or top, 1 = right or bottom, None = the middle) and whether it is mirrored."""

    across: float | None = None
    down: float | None = None
    flipped: bool = False


def draw_geometry(config: DataConfig, generator: torch.Generator) -> Geometry:
    """Draw flip and crop. The same numbers are drawn whatever the config: the flip does not depend on `crop`."""
    flip, across, down = torch.rand(3, generator=generator).tolist()
    flipped = config.flip and flip < 0.5
    return Geometry(across, down, flipped) if config.crop == "random" else Geometry(flipped=flipped)


def transform(sample: Sample, config: DataConfig, generator: torch.Generator | None) -> Transformed:
    """Crop, resize and flip one sample as `config` says; without a generator the middle is cut and nothing flipped."""
    geometry = Geometry() if generator is None else draw_geometry(config, generator)
    return apply_geometry(sample, config.resolution, geometry)


def apply_geometry(sample: Sample, resolution: int, geometry: Geometry) -> Transformed:
    """Cut the largest square out of each part at the same place and resize it to `resolution`.

    It is "short side to `resolution`, then crop", in the order that never holds a huge intermediate for a long strip.
    The image is resized with Lanczos (which averages when reducing), the map takes the nearest pixel so that no class
    is invented, the mask's pixels are averaged over their area so that a thin stroke still counts.
    """

    def cut(image: Image.Image, resample: Image.Resampling) -> Image.Image:
        return _cut_square(image, resolution, geometry, resample)

    image = None if sample.image is None else to_tensor(cut(sample.image, Image.Resampling.LANCZOS))
    semantic = mask = None
    if sample.semantic is not None:
        classes = np.array(cut(sample.semantic, Image.Resampling.NEAREST), dtype=np.int64)
        semantic = torch.from_numpy(classes)  # [R, R]
    if sample.mask is not None:
        area = np.array(cut(sample.mask, Image.Resampling.BOX), dtype=np.float32)
        mask = torch.from_numpy(area).div(255)[None]  # [1, R, R]
    return Transformed(image, semantic, mask)


def _cut_square(image: Image.Image, resolution: int, geometry: Geometry, resample: Image.Resampling) -> Image.Image:
    side = min(image.size)
    left = _offset(image.width - side, geometry.across)
    top = _offset(image.height - side, geometry.down)
    square = image.crop((left, top, left + side, top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), resample)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flipped else square


def _offset(free: int, place: float | None) -> int:
    """A whole offset in 0..free, each as likely as the others for a uniform `place` in [0, 1)."""
    return free // 2 if place is None else min(int(place * (free + 1)), free)
