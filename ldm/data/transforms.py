"""A sample to tensors of a given size: cropped, resized, perhaps flipped; maps and masks follow the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.buckets import Size, bucket_sizes, nearest_size
from ldm.data.images import to_tensor
from ldm.data.sample import Sample

if TYPE_CHECKING:
    from ldm.data.sources import DataConfig


@dataclass(frozen=True)
class Transformed:
    """Tensors of one sample. What the sample does not have is None."""

    image: Tensor | None
    """float32 [3, H, W] in [-1, 1]."""
    semantic: Tensor | None
    """int64 [H, W], 255 = unknown."""
    mask: Tensor | None
    """float32 [1, H, W] in [0, 1], 1 = repaint."""


@dataclass(frozen=True)
class Geometry:
    """Where the piece is cut (0 = left or top, 1 = right or bottom, None = the middle) and whether it is mirrored."""

    across: float | None = None
    down: float | None = None
    flipped: bool = False


def draw_geometry(config: DataConfig, generator: torch.Generator) -> Geometry:
    """Draw flip and crop. The same numbers are drawn whatever the config: the flip does not depend on `crop`."""
    flip, across, down = torch.rand(3, generator=generator).tolist()
    flipped = config.flip and flip < 0.5
    return Geometry(across, down, flipped) if config.crop == "random" else Geometry(flipped=flipped)


def size_for(sample: Sample, config: DataConfig) -> Size:
    """Width and height that a sample with its image is brought to: the square, or its bucket."""
    if config.buckets is None or sample.image is None:
        return config.resolution, config.resolution
    return nearest_size(sample.image.size, bucket_sizes(config.resolution, config.buckets))


def apply_geometry(sample: Sample, size: Size, geometry: Geometry) -> Transformed:
    """Cut the largest piece of the aspect ratio of `size` (width, height) out of each part and resize it to `size`.

    It is "resize to cover, then crop", in the order that never holds a huge intermediate for a long strip.
    The image is resized with Lanczos (which averages when reducing), the map takes the nearest pixel so that no class
    is invented, the mask's pixels are averaged over their area so that a thin stroke still counts.
    """

    def cut(image: Image.Image, resample: Image.Resampling) -> Image.Image:
        return _cut(image, size, geometry, resample)

    image = None if sample.image is None else to_tensor(cut(sample.image, Image.Resampling.LANCZOS))
    semantic = mask = None
    if sample.semantic is not None:
        classes = np.array(cut(sample.semantic, Image.Resampling.NEAREST), dtype=np.int64)
        semantic = torch.from_numpy(classes)  # [H, W]
    if sample.mask is not None:
        area = np.array(cut(sample.mask, Image.Resampling.BOX), dtype=np.float32)
        mask = torch.from_numpy(area).div(255)[None]  # [1, H, W]
    return Transformed(image, semantic, mask)


def _cut(image: Image.Image, size: Size, geometry: Geometry, resample: Image.Resampling) -> Image.Image:
    # The piece may end inside a pixel: its sides have exactly the ratio of `size`, so that nothing is distorted.
    width = min(image.width, image.height * size[0] / size[1])
    height = min(image.height, image.width * size[1] / size[0])
    left = _offset(image.width - math.ceil(width), geometry.across)
    top = _offset(image.height - math.ceil(height), geometry.down)
    piece = image.crop((left, top, left + math.ceil(width), top + math.ceil(height)))
    if (width, height) != size:
        piece = piece.resize(size, resample, box=(0, 0, width, height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flipped else piece


def _offset(free: int, place: float | None) -> int:
    """A whole offset in 0..free, each as likely as the others for a uniform `place` in [0, 1)."""
    return free // 2 if place is None else min(int(place * (free + 1)), free)
