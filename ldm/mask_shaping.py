"""Masks before and after the model: read, checked, grown, faded at their inner edge, resized. 1 = repaint, 0 = keep."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ldm.data.images import FORMATS, open_mask
from ldm.data.sample import BadSample
from ldm.errors import UserError

MaskLike = Image.Image | np.ndarray
Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, as Pillow has them: right and bottom lie just outside."""


def read_mask(path: str | Path) -> Image.Image:
    """The mask in a file: mode L, 255 = repaint. Formats as `ldm.data.images.FORMATS`.

    Grey is taken as it is, colour by its luminance, transparency as "keep". One exception: where all visible pixels
    have one colour and the transparency varies, somebody painted the mask on an empty layer, so opacity is the mask,
    whatever the colour. Raises `UserError` if the file cannot be read.
    """
    try:
        mask = open_mask(path)
    except BadSample as error:
        raise UserError(f"mask {error}; allowed is a picture whose white pixels are to be repainted") from error
    with Image.open(path, formats=FORMATS) as image:  # open_mask has shown that it can be read
        if not image.has_transparency_data:
            return mask
        image.load()
        pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))  # [H, W, 4]
    opacity = pixels[..., 3]
    colours = pixels[opacity > 0][:, :3]
    painted = len(colours) > 0 and opacity.min() < opacity.max() and bool((colours == colours[0]).all())
    return Image.fromarray(np.ascontiguousarray(opacity)) if painted else mask


def mask_array(mask: MaskLike, size: tuple[int, int]) -> np.ndarray:
    """A mask as float32 [H, W] in [0, 1], its own copy.

    Args:
        mask: a picture of mode L or 1, or RGB by its luminance; or an array [H, W] of bool, uint8 (0 to 255) or float
            (0 to 1).
        size: (width, height) of the image that the mask belongs to.

    Raises:
        UserError: for another size, mode or type, and for numbers outside the range.
    """
    values = _picture_values(mask) if isinstance(mask, Image.Image) else np.asarray(mask)
    if values.ndim != 2:
        raise UserError(f"mask: found an array of shape {list(values.shape)}; allowed is [height, width]")
    if (values.shape[1], values.shape[0]) != tuple(size):
        found = f"found {values.shape[1]} x {values.shape[0]} pixels for an image of {size[0]} x {size[1]}"
        raise UserError(f"mask: {found}; allowed is the image's own size; resize one of the two")
    if values.dtype == np.uint8:
        return values.astype(np.float32) / np.float32(255)
    if values.dtype == np.bool_:
        return values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"mask: found numbers of type {values.dtype}; allowed is bool, uint8 (0-255) or float (0-1)")
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # not a number fails both
        raise UserError(f"mask: found values from {values.min()} to {values.max()}; allowed is 0 (keep) to 1 (repaint)")
    return values.astype(np.float32)


def _picture_values(mask: Image.Image) -> np.ndarray:
    if mask.mode not in ("L", "1", "RGB"):
        raise UserError(f"mask: found a picture of mode {mask.mode}; allowed is L, 1 or RGB; read files with read_mask")
    return np.asarray(mask.convert("L") if mask.mode == "RGB" else mask)


def bounding_box(mask: np.ndarray) -> Box | None:
    """The smallest box that holds every pixel above 0 of mask [H, W]; None if there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def grown_box(box: Box, pixels: int, width: int, height: int) -> Box:
    """`box` with `pixels` more on each side, cut at the picture's border."""
    left, top, right, bottom = box
    return max(0, left - pixels), max(0, top - pixels), min(width, right + pixels), min(height, bottom + pixels)


def window(box: Box) -> tuple[slice, slice]:
    """`box` as the index of an array [H, W, ...]."""
    left, top, right, bottom = box
    return slice(top, bottom), slice(left, right)


def dilated(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The mask [H, W] grown: the largest value at most `pixels` (Euclidean) away, so soft edges stay soft."""
    box = bounding_box(mask)
    if box is None or pixels == 0:
        return mask.copy()
    height, width = mask.shape
    radius = min(pixels, height + width)
    result = np.zeros_like(mask)
    place = window(grown_box(box, radius, width, height))
    result[place] = _disc_maximum(mask[place], radius)
    return result


def _disc_maximum(values: np.ndarray, radius: int) -> np.ndarray:
    """Largest value in a disc round each pixel: running maxima along the row, as wide as a chord, moved up and down.

    It takes 4 passes per pixel of radius, where a direct search takes radius squared.
    """
    result, running, chord = values.copy(), values.copy(), 0
    for offset in range(radius, -1, -1):  # chords grow from the disc's top to its middle
        half = math.isqrt(radius**2 - offset**2)
        for step in range(chord + 1, half + 1):
            _raise_to(running, values, step, axis=1)
        chord = half
        _raise_to(result, running, offset, axis=0)
    return result


def _raise_to(target: np.ndarray, values: np.ndarray, shift: int, axis: int) -> None:
    """target = max(target, values moved by `shift` both ways along `axis`), in place."""
    if shift >= values.shape[axis]:
        return
    target, values = (target, values) if axis == 0 else (target.T, values.T)
    end = len(values) - shift
    np.maximum(target[shift:], values[:end], out=target[shift:])
    np.maximum(target[:end], values[shift:], out=target[:end])


def inward_ramp(mask: np.ndarray, feather: int) -> np.ndarray:
    """How far the new picture has faded in, float32 [H, W] in [0, 1]: 0 where the mask is 0; all 1 for feather 0.

    ramp = d / r. d is the Euclidean distance to the nearest pixel with mask 0, at most feather + 1; the picture's own
    border is no edge. r is the largest d that can be reached in `feather` steps without leaving the mask. In a region
    thicker than the feather r is feather + 1, so the ramp is the plain one: 1 / (feather + 1) in the outermost pixel
    and 1 from feather + 1 inwards. A stroke thinner than the feather has r = its own half width, so its middle is 1:
    it is repainted, and fades over the width it has. Where a thin stroke joins a thick region, r falls by one a step,
    so nothing jumps.
    """
    if feather == 0:
        return np.ones_like(mask)
    result = np.zeros_like(mask)
    box = bounding_box(mask)
    if box is None:
        return result
    height, width = mask.shape
    place = window(grown_box(box, 1, width, height))  # one pixel more: the kept pixels nearest to the mask
    inside = mask[place] > 0
    steps = min(feather, height + width)
    distance = distance_to_kept(inside, steps + 1)
    highest = _highest_within(distance, inside, steps)
    np.divide(distance, highest, out=result[place], where=inside)
    return result


def distance_to_kept(inside: np.ndarray, limit: int) -> np.ndarray:
    """Euclidean distance from each pixel to the nearest that is not `inside`, at most `limit`; float32 [H, W].

    First along the columns, then across (Felzenszwalb & Huttenlocher 2012), which is exact.
    """
    down = np.where(inside, np.float32(limit), np.float32(0))
    for y in range(1, len(down)):
        np.minimum(down[y], down[y - 1] + 1, out=down[y])
    for y in range(len(down) - 2, -1, -1):
        np.minimum(down[y], down[y + 1] + 1, out=down[y])
    squared = down**2
    nearest = squared.copy()
    for step in range(1, min(limit, inside.shape[1])):
        np.minimum(nearest[:, step:], squared[:, :-step] + step**2, out=nearest[:, step:])
        np.minimum(nearest[:, :-step], squared[:, step:] + step**2, out=nearest[:, :-step])
    return np.minimum(np.sqrt(nearest), np.float32(limit))


def _highest_within(values: np.ndarray, inside: np.ndarray, steps: int) -> np.ndarray:
    """The largest value that can be reached in `steps` steps, also diagonal ones, without leaving `inside`."""
    for _ in range(steps):
        across = values.copy()
        _raise_to(across, values, 1, axis=1)
        grown = across.copy()
        _raise_to(grown, across, 1, axis=0)
        grown *= inside
        if np.array_equal(grown, values):
            break
        values = grown
    return values


def resized_to_cover(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask [H, W] at another size: each new pixel is the largest of all the old ones that it touches.

    So every pixel that will change lies in the model's hole, however thin; what the hole has too much is put back.
    """
    for axis, size in ((0, height), (1, width)):
        old = mask.shape[axis]
        if old == size:
            continue
        starts = np.arange(size) * old // size
        ends = -(-np.arange(1, size + 1) * old // size)  # rounded up
        pairs = np.stack([starts, ends], axis=1).ravel()
        end = [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)]  # reduceat takes no index past the end
        mask = np.maximum.reduceat(np.pad(mask, end), pairs, axis=axis).take(np.arange(size) * 2, axis=axis)
    return mask
