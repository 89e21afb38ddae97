"""The pixel side of inpainting: what the model is given of a picture, and how its work gets back into it.

Whatever the options: where the (dilated) mask is 0, `Canvas.compose` gives the picture's own bytes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ldm.errors import UserError
from ldm.mask_shaping import (
    Box,
    MaskLike,
    bounding_box,
    dilated,
    grown_box,
    inward_ramp,
    mask_array,
    resized_to_cover,
    window,
)

FillName = Literal["original", "blur", "grey", "noise"]
MOST_PIXELS = 2**27
"""Of an extended picture: 134 million, a photograph's largest size and more than a model can draw."""
GREY = 127.5
"""The middle of 0 to 255, which is 0 for the model."""


@dataclass(frozen=True, kw_only=True)
class InpaintingOptions:
    """How a mask is used. Lengths are pixels of the picture as it was given, also where the model works on a crop.

    Attributes:
        dilate: the mask grows by this before anything else.
        feather: over this many pixels the new picture fades in, inwards only; strokes thinner than that fade over the
            width they have (`ldm.mask_shaping.inward_ramp`).
        crop_padding: None: the model works on the whole picture. A number: on the mask's bounding box and so many
            pixels around it ("only the masked region"), 32 as a rule.
        fill: what stands in the hole at the start, which matters at strength < 1: "original" what is there, "blur" the
            colours around it, "grey", or "noise", which the pipeline makes (the canvas then keeps the original).
        blend: each step ends at the known latents outside the mask, also in a network that was trained with masks: what
            it draws then fits into the hole better. AUTOMATIC1111 and ComfyUI do so, diffusers does not. A network
            without mask channels always blends.
    """

    dilate: int = 0
    feather: int = 0
    crop_padding: int | None = None
    fill: FillName = "original"
    blend: bool = True

    def __post_init__(self) -> None:
        for name in ("dilate", "feather", "crop_padding"):
            found = getattr(self, name)
            whole = isinstance(found, int) and not isinstance(found, bool) and found >= 0
            if not whole and not (name == "crop_padding" and found is None):
                none = "leave it out to work on the whole picture" if name == "crop_padding" else "0 is none"
                raise ValueError(f"{name}: found {found!r}; allowed is a whole number of pixels from 0; {none}")
        if self.fill not in (allowed := get_args(FillName)):
            raise ValueError(f"fill: found {self.fill!r}; allowed is {', '.join(allowed)}; choose one of these")


@dataclass(frozen=True)
class Canvas:
    """What the model works on, and the way back. Made by `prepare_canvas`."""

    image: Image.Image
    """RGB, sides multiples of the factor; the hole filled as the options say."""
    mask: np.ndarray
    """float32 [H, W] in [0, 1], H x W the size of `image`; dilated, not feathered. 1 = repaint."""
    original: Image.Image
    alpha: np.ndarray
    """float32 [H, W] in [0, 1] at the original's size: the new picture's share in the result."""
    box: Box
    """The part of the original that `image` shows."""
    inner_size: tuple[int, int]
    """(width, height) of that part in `image`; right of it and below it lies padding."""
    fill: FillName
    blend: bool

    @property
    def empty(self) -> bool:
        """Whether nothing is to be repainted, so that no model need be asked."""
        return bounding_box(self.alpha) is None

    def compose(self, generated: Image.Image) -> Image.Image:
        """Put the model's picture, an RGB image of the size of `image`, into the original.

        Returns an RGB picture of the original's size: round(alpha * generated + (1 - alpha) * original), where
        alpha = mask * inward ramp. Raises `ValueError` for a picture of another size or mode.
        """
        if (generated.mode, generated.size) != ("RGB", self.image.size):
            found = f"{generated.mode} of {generated.size[0]} x {generated.size[1]}"
            wanted = f"RGB of {self.image.size[0]} x {self.image.size[1]}"
            raise ValueError(f"generated: found {found} pixels; allowed is {wanted}, the canvas's own size")
        changed = bounding_box(self.alpha)
        if changed is None:
            return self.original.copy()
        left, top, right, bottom = self.box
        part = _resized(generated.crop((0, 0, *self.inner_size)), right - left, bottom - top)
        pixels = np.array(self.original)  # [H, W, 3]
        place = window(changed)
        new = np.asarray(part)[changed[1] - top : changed[3] - top, changed[0] - left : changed[2] - left]
        alpha = self.alpha[place][..., None]  # [h, w, 1]
        pixels[place] = np.rint(alpha * new + (1 - alpha) * pixels[place]).astype(np.uint8)
        return Image.fromarray(pixels)


def prepare_canvas(
    image: Image.Image,
    mask: MaskLike,
    options: InpaintingOptions | None = None,
    *,
    factor: int = 8,
    model_size: tuple[int, int] = (512, 512),
) -> Canvas:
    """Make the canvas that the model works on.

    Without `crop_padding` it is the whole picture at its own size. With it, it is the mask's bounding box grown by the
    padding and widened to the model's shape as far as the picture reaches, resized to the model's size; where the
    picture does not reach, it is resized by one scale to fit. The last row and column are repeated up to the next
    multiple of `factor`.

    Args:
        image: RGB, any size.
        mask: of the same size, white (1) = repaint; see `mask_array`.
        factor: the autoencoder's downsampling.
        model_size: (height, width) that the model was made for, multiples of `factor`; for crops only.

    Raises `UserError` for an image that is not RGB, a mask that does not fit, a model size that is no multiple.
    """
    options = options or InpaintingOptions()
    _check_image(image)
    if options.crop_padding is not None and any(side < factor or side % factor for side in model_size):
        raise UserError(f"model size: found {model_size[0]} x {model_size[1]}; allowed is multiples of {factor}")
    hole = dilated(mask_array(mask, image.size), options.dilate)  # [H, W]
    box, inner_size, changed = (0, 0, *image.size), image.size, bounding_box(hole)
    if changed is not None and options.crop_padding is not None:
        box = _crop_box(grown_box(changed, options.crop_padding, *image.size), image.size, model_size)
        inner_size = _working_size(box, model_size)
    part = _resized(_filled(image, hole, options.fill).crop(box), *inner_size)
    part_mask = resized_to_cover(hole[window(box)], inner_size[1], inner_size[0])
    right, bottom = -inner_size[0] % factor, -inner_size[1] % factor
    return Canvas(
        image=_padded(part, right=right, bottom=bottom),
        mask=np.pad(part_mask, ((0, bottom), (0, right)), mode="edge"),
        original=image,
        alpha=hole * inward_ramp(hole, options.feather),
        box=box,
        inner_size=inner_size,
        fill=options.fill,
        blend=options.blend,
    )


def extend(
    image: Image.Image, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Outpainting: the picture with so many pixels added on each side, and the mask (mode L) of what is new.

    The new part repeats the nearest pixel of the border; the old part keeps its bytes and is 0 in the mask.
    Raises `UserError` for a negative amount, if there is nothing to add, and for an image that is not RGB.
    """
    _check_image(image)
    amounts = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, amount in amounts.items():
        if amount < 0:
            raise UserError(f"{name}: found {amount} pixels to add; allowed is 0 or more; crop the picture beforehand")
    pixels = (image.width + left + right) * (image.height + top + bottom)
    if pixels > MOST_PIXELS:
        raise UserError(f"found {pixels:,} pixels to make; allowed is {MOST_PIXELS:,}; extend the picture by less")
    if not any(amounts.values()):
        raise UserError("found 0 pixels to add on all four sides; allowed is 1 or more on at least one")
    mask = Image.new("L", (image.width + left + right, image.height + top + bottom), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return _padded(image, left=left, top=top, right=right, bottom=bottom), mask


def _check_image(image: Image.Image) -> None:
    if image.mode != "RGB" or 0 in image.size:
        found = f"{image.mode} picture of {image.width} x {image.height} pixels"
        raise UserError(f"image: found a {found}; allowed is RGB of any size; convert it first")


def _crop_box(box: Box, size: tuple[int, int], model_size: tuple[int, int]) -> Box:
    """`box` widened on both sides to the model's shape; at the picture's end it is moved, if there is room, not cut."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    wide = max(width, round(height * model_size[1] / model_size[0]))
    high = max(height, round(width * model_size[0] / model_size[1]))
    left, right = _widened(left, right, wide, size[0])
    top, bottom = _widened(top, bottom, high, size[1])
    return left, top, right, bottom


def _widened(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    length = min(length, limit)
    start = min(max(0, start - (length - (end - start)) // 2), limit - length)
    return start, start + length


def _working_size(box: Box, model_size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which the model sees `box`: its own size if the shapes agree, else the largest that fits."""
    width, height = box[2] - box[0], box[3] - box[1]
    high, wide = model_size
    if 2 * abs(width * high - height * wide) <= max(high, wide):  # equal but for the rounding to whole pixels
        return wide, high
    scale = min(wide / width, high / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    """Lanczos, which averages when reducing; a picture that has the size already keeps its bytes."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def _padded(image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0) -> Image.Image:
    return Image.fromarray(np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge"))


def _filled(image: Image.Image, mask: np.ndarray, fill: FillName) -> Image.Image:
    hole = bounding_box(mask)
    if hole is None or fill in ("original", "noise"):
        return image
    around = max(hole[2] - hole[0], hole[3] - hole[1]) // 2 + 8  # far colours hardly count, and a photograph is large
    place = window(grown_box(hole, around, *image.size))
    result = np.array(image)  # [H, W, 3]
    pixels = result[place].astype(np.float32)
    kept = (1 - mask[place])[..., None]  # [h, w, 1]
    filled = pixels * kept + GREY * (1 - kept) if fill == "grey" else _from_around(pixels * kept, kept)
    result[place] = np.rint(filled).clip(0, 255)
    return Image.fromarray(result)


def _from_around(colours: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Complete a picture from coarser and coarser averages of what is known ("push-pull", Gortler et al. 1996, 3.4).

    `colours` [h, w, 3] are multiplied by `weights` [h, w, 1] in [0, 1]; where the weight is 1 nothing changes. If
    nothing is known at all it is grey.
    """
    height, width = weights.shape[:2]
    if height == width == 1:
        return colours / weights if weights.item() > 0 else np.full_like(colours, GREY)
    sums, totals = _summed_by_fours(colours), _summed_by_fours(weights)
    coarse = _from_around(sums / np.maximum(totals, 1), np.minimum(totals, 1))
    size = (2 * coarse.shape[1], 2 * coarse.shape[0])
    bands = [Image.fromarray(band).resize(size, Image.Resampling.BILINEAR) for band in np.moveaxis(coarse, 2, 0)]
    smooth = np.stack([np.asarray(band) for band in bands], axis=2)[:height, :width]  # [h, w, 3]
    return colours + (1 - weights) * smooth


def _summed_by_fours(values: np.ndarray) -> np.ndarray:
    """Sums over blocks of 2 x 2, [h, w, c] -> [ceil(h / 2), ceil(w / 2), c]; beyond the border lies 0."""
    height, width, channels = values.shape
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2, channels).sum(axis=(1, 3))
