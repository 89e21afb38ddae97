"""Semantic maps read back from pictures of the built-in scenes, and how well they agree with the maps asked for.

A pixel belongs to an object if the object's colour covers at least half of it, as in the scenes' own maps. The outline
is taken from the pixels as drawn, never from a template alone, so that a ragged or misplaced object costs intersection
over union; only the class of each part is that of the scorer's best template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from ldm.data.sample import UNKNOWN_CLASS
from ldm.data.scene_rendering import PALETTE, emoji_sprite
from ldm.data.scenes import ScenesConfig
from ldm.evaluation.scenes import (
    Array,
    Found,
    colour_distances,
    connected_parts,
    explain_by_emoji,
    find_background,
    grown_by_one,
    match_peaks,
    object_sides,
    pixels_of,
    shape_bank,
)

_INVISIBLE = 30.0  # RGB distance: half the least one between two colours of the palette


def recover_map(image: Image.Image, config: ScenesConfig) -> Array:
    """The semantic map uint8 [H, W] that a square picture shows: 0 = background, i = the i-th object.

    Raises `ValueError` if the picture is not square.
    """
    return _map_of_shapes(image, config) if config.kind == "shapes" else _map_of_emoji(image, config)


def _map_of_shapes(image: Image.Image, config: ScenesConfig) -> Array:
    """Every part that differs from the background gets the class of the template most like it.

    However many parts there are and however little they look like any: what does not belong there counts as wrong,
    never as background.
    """
    pixels = pixels_of(image)  # at most 64 px a side, enough to tell shapes apart
    background, colour = find_background(pixels, config)
    contrast = np.linalg.norm(pixels - colour, axis=2)
    whole = np.linalg.norm(np.asarray(image.convert("RGB"), dtype=np.float32) - colour, axis=2)  # [H, W]
    result = np.zeros(whole.shape, dtype=np.uint8)
    most = np.zeros(whole.shape, dtype=np.float32)
    for part, ink in _parts(contrast, background, config):
        around = grown_by_one(part)
        number = _class_of(np.clip(contrast / ink, 0, 1) * around, config)
        enlarged = Image.fromarray(around).resize(image.size, Image.Resampling.NEAREST)
        coverage = np.clip(whole / ink, 0, 1) * np.asarray(enlarged, dtype=np.float32)  # [H, W]
        mine = (coverage >= 0.5) & (coverage > most)
        result[mine] = number
        most[mine] = coverage[mine]
    return result


def _map_of_emoji(image: Image.Image, config: ScenesConfig) -> Array:
    """A pixel is an emoji's if it looks like that emoji there, or like neither it nor the background.

    The template only decides where it has, all but `_INVISIBLE`, the colour of the background, so that nothing can be
    seen. What no template accounts for belongs to the nearest emoji, and to the last class if there is none.
    """
    small = pixels_of(image)
    background, colour = find_background(small, config)
    found = explain_by_emoji(small, background, colour, config)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    expected = np.broadcast_to(colour, pixels.shape).astype(np.float32)  # [H, W, 3]
    result = np.zeros(pixels.shape[:2], dtype=np.uint8)
    contrast = np.linalg.norm(pixels - colour, axis=2)
    for one in reversed(found):  # the first explains most and lies on top
        window, sprite = _sprite_at(one, len(pixels))
        coverage = sprite[..., 3:] / 255
        expected[window] += coverage * (sprite[..., :3] - expected[window])
        missing = np.linalg.norm(pixels[window] - expected[window], axis=2) - contrast[window] > _INVISIBLE
        owned = (coverage[..., 0] >= 0.5) & ~missing
        result[window][owned] = config.object_names.index(one.name) + 1
    foreign = (np.minimum(contrast, np.linalg.norm(pixels - expected, axis=2)) > 2 * _INVISIBLE) & (result == 0)
    result[foreign] = _nearest(foreign, found, config)
    return result


def _sprite_at(found: Found, resolution: int) -> tuple[tuple[slice, slice], Array]:
    """Where an emoji lies in a picture of this side, and what it looks like, RGBA [h, w, 4], cut off at the edge."""
    side = max(1, round(found.side * resolution))
    left, top = (max(0, round(centre * resolution - side / 2)) for centre in (found.x, found.y))
    window = slice(top, min(top + side, resolution)), slice(left, min(left + side, resolution))
    sprite = np.asarray(emoji_sprite(found.name, side), dtype=np.float32)
    return window, sprite[: window[0].stop - top, : window[1].stop - left]


def _nearest(pixels: Array, found: Sequence[Found], config: ScenesConfig) -> Array:
    """For each pixel of a mask [H, W] the class of the object whose centre is nearest."""
    if not found:
        return np.array(len(config.object_names))
    places = (np.argwhere(pixels) + 0.5) / len(pixels)  # [N, 2] of y, x
    centres = np.array([(one.y, one.x) for one in found])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(axis=1)
    return np.array([config.object_names.index(one.name) + 1 for one in found])[nearest]


def _parts(contrast: Array, background: str, config: ScenesConfig) -> Iterator[tuple[Array, float]]:
    """The connected parts [H, W] that differ from the background, each with the contrast of its core.

    What counts as different, and how small a part is noise, is as in the scorer.
    """
    candidates = [name for name in config.colour_names if name != background]
    nearest = colour_distances(np.array([PALETTE[background]], dtype=np.float32), candidates).min()
    areas = shape_bank(config.object_names, object_sides(config, len(contrast))[0], len(contrast))[2]
    for part in connected_parts(contrast > min(60.0, nearest / 2)):
        if part.sum() > 0.4 * areas.min():
            inside = contrast[part]
            yield part, float(np.median(inside[inside >= np.median(inside)]))  # free of antialiased edges


def _class_of(coverage: Array, config: ScenesConfig) -> int:
    """The class, from 1 on, of the template with the greatest soft Dice coefficient with a coverage [H, W]."""
    resolution = len(coverage)
    spectrum, energy = np.fft.rfft2(coverage), float((coverage**2).sum())
    best, most = 0, -1.0
    for side in object_sides(config, resolution):
        templates, squares, _ = shape_bank(config.object_names, side, resolution)
        overlap, _, _ = match_peaks(spectrum * templates, side, resolution)
        dice = 2 * overlap / (energy + squares)
        if dice.max() > most:
            best, most = int(dice.argmax()) + 1, float(dice.max())
    return best


def mean_iou(expected: Array, found: Array, classes: int) -> float:
    """Intersection over union of two index arrays of one shape, averaged over the classes present in either.

        mean over c of |E = c and F = c| / |E = c or F = c|,   c in 0 .. classes - 1 with |E = c or F = c| > 0

    Pixels that are unknown (255) in either are left out. Background is a class like any other. Raises `ValueError` for
    other shapes, for classes outside 0 .. classes - 1, and when no pixel is known in both.
    """
    if expected.shape != found.shape:
        raise ValueError(f"maps: found shapes {expected.shape} and {found.shape}; allowed is one for both")
    known = (expected != UNKNOWN_CLASS) & (found != UNKNOWN_CLASS)
    if not known.any():
        raise ValueError("maps: found no pixel that is known in both; the mean over no class is not a number")
    pairs = expected[known].astype(np.int64), found[known].astype(np.int64)
    highest, lowest = max(int(values.max()) for values in pairs), min(int(values.min()) for values in pairs)
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"maps: found class {lowest if lowest < 0 else highest}; allowed is 0 to {classes - 1}, or 255"
        )
    counts = np.bincount(pairs[0] * classes + pairs[1], minlength=classes**2).reshape(classes, classes)
    shared = counts.diagonal()
    either = counts.sum(axis=0) + counts.sum(axis=1) - shared
    return float((shared[either > 0] / either[either > 0]).mean())


def map_picture(indices: Image.Image | Array) -> Image.Image:
    """A semantic map [H, W] in colours, RGB: background black, classes in the palette's order, unknown mid-grey."""
    colours = [PALETTE["black"], *(colour for name, colour in PALETTE.items() if name not in ("black", "grey"))]
    table = np.array([colours[i % len(colours)] for i in range(256)], dtype=np.uint8)
    table[UNKNOWN_CLASS] = PALETTE["grey"]
    return Image.fromarray(table[np.asarray(indices)])
