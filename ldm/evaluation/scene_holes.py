"""Holes in pictures of scenes, and what was painted into them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from ldm.data.scene_rendering import PALETTE, Scene
from ldm.data.scenes import ScenesConfig
from ldm.evaluation.scenes import find_background, find_objects, pixels_of
from ldm.evaluation.seam import seam_gradient

_CLOSE = 30.0  # RGB distance: half the least one between two colours of the palette


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def hole_over(scene: Scene, resolution: int) -> Box:
    """The box of the first object with room around it, as a person would mark it.

    Each side grows by a pixel in turn, by up to an eighth of the picture's side, within the picture and as long as a
    pixel of background stays before another object. The first pixel of growth may take that one too.
    """
    edges = [thing.pixels(resolution) for thing in scene.objects]
    boxes: list[Box] = [(left, top, left + side, top + side) for left, top, side in edges]
    hole, others = boxes[0], boxes[1:]
    for turn in range(max(1, resolution // 8)):
        room = 0 if turn == 0 else 1
        for side, step in enumerate((-1, -1, 1, 1)):
            moved = [*hole]
            moved[side] += step
            grown: Box = (moved[0], moved[1], moved[2], moved[3])
            if 0 <= grown[side] <= resolution and not any(_meet(grown, other, room) for other in others):
                hole = grown
    return hole


def _meet(one: Box, other: Box, room: int) -> bool:
    """Whether there are less than `room` pixels between two boxes."""
    apart = (other[0] - one[2], one[0] - other[2], other[1] - one[3], one[1] - other[3])
    return max(apart) < room


def hole_mask(hole: Box, resolution: int) -> Image.Image:
    """Mode L, white in the hole."""
    mask = Image.new("L", (resolution, resolution))
    mask.paste(255, hole)
    return mask


def hole_alone(picture: Image.Image, hole: Box, scene: Scene) -> Image.Image:
    """The hole's content on the scene's plain background."""
    canvas = Image.new("RGB", picture.size, PALETTE[scene.background])
    canvas.paste(picture.crop(hole), hole)
    return canvas


def only_first_object(scene: Scene) -> Scene:
    """The scene without its other objects."""
    return replace(scene, objects=scene.objects[:1], relation=None)


def same_outside(picture: Image.Image, given: Image.Image, mask: Image.Image) -> bool:
    """Whether every pixel outside the mask is the given one, byte for byte."""
    outside = np.asarray(mask) == 0
    return np.array_equal(np.asarray(picture)[outside], np.asarray(given)[outside])


def continues_background(picture: Image.Image, hole: Box, scene: Scene) -> bool:
    """Whether the median colour along the hole's inner edge is the scene's background."""
    pixels = np.asarray(picture.crop(hole), dtype=np.float32)
    width = max(1, picture.width // 48)
    edge = np.ones(pixels.shape[:2], dtype=bool)
    edge[width:-width, width:-width] = False
    return float(np.linalg.norm(np.median(pixels[edge], axis=0) - PALETTE[scene.background])) < _CLOSE


def names_in_hole(picture: Image.Image, hole: Box, scene: Scene, config: ScenesConfig) -> list[str]:
    """The objects in the hole, `NOTHING` for what is like none; [] for plain background."""
    pixels = pixels_of(hole_alone(picture, hole, scene))
    return [found.name for found in find_objects(pixels, *find_background(pixels, config), config)]


def mean_seams(pictures: Sequence[Image.Image], masks: Sequence[Image.Image], prefix: str = "") -> dict[str, float]:
    """Means of `SeamFigure.seam` and `.image` over the pictures, 0 to 255."""
    figures = [seam_gradient(picture, mask) for picture, mask in zip(pictures, masks, strict=True)]
    return {
        f"{prefix}seam_gradient": float(np.mean([figure.seam for figure in figures])),
        f"{prefix}image_gradient": float(np.mean([figure.image for figure in figures])),
    }
