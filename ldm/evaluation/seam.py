"""Does an inpainted picture show where its hole was? The step across the mask's border against the picture's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.mask_shaping import MaskLike, mask_array


@dataclass(frozen=True)
class SeamFigure:
    """Differences between neighbouring pixels, 0 to 255."""

    seam: float
    """Mean over the pairs of neighbours of which one was kept (mask 0) and the other was not."""
    image: float
    """Mean over all other pairs of neighbours."""
    percentile_95: float
    """95 % of those other pairs differ by no more than this: what still passes for an edge of the picture's own."""
    ratio: float
    """seam / image. 1: the border is like the rest. Infinite if all the rest is flat, 1 if the border is flat too."""


def seam_gradient(image: Image.Image, mask: MaskLike) -> SeamFigure:
    """Measure how much a picture changes across the border of its mask.

    A pair is two pixels side by side or one above the other; its difference is the mean of |a - b| over red, green and
    blue. With S the pairs across the border between mask 0 and mask > 0, and P all pairs:
    seam = mean over S, image = mean over P without S, ratio = seam / image.

    Args:
        image: RGB, e.g. the result of `ldm.canvas.Canvas.compose`.
        mask: the (dilated) mask of that size, see `ldm.mask_shaping.mask_array`.

    Raises:
        UserError: if the image is not RGB, the mask does not fit, or the border or the rest has no pair.
    """
    if image.mode != "RGB":
        raise UserError(f"image: found mode {image.mode}; allowed is RGB; convert it first")
    changed = mask_array(mask, image.size) > 0  # [H, W]
    pixels = np.asarray(image, dtype=np.int16)  # [H, W, 3]
    steps = [np.abs(np.diff(pixels, axis=axis)).mean(axis=2).ravel() for axis in (0, 1)]
    across = [np.diff(changed, axis=axis).ravel() for axis in (0, 1)]
    step, border = np.concatenate(steps), np.concatenate(across)
    if border.all() or not border.any():
        share = f"{changed.mean():.0%} of the pixels are to be repainted"
        raise UserError(f"mask: {share}; allowed is a mask with a border and neighbours elsewhere; measure another one")
    seam, own = float(step[border].mean()), float(step[~border].mean())
    return SeamFigure(
        seam=seam,
        image=own,
        percentile_95=float(np.percentile(step[~border], 95)),
        ratio=seam / own if own > 0 else math.inf if seam > 0 else 1.0,
    )
