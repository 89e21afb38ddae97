"""Inpainting as a condition: which masks training draws, the masked image, and the mask at latent size.

A mask is 1 where the image is to be repainted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from conditioning.area import area_mean
from conditioning.masks import (
    BRUSHES,
    MaskSize,
    box_mask,
    full_mask,
    half_plane_mask,
    object_mask,
    stroke_mask,
    uniform,
)

MaskKind = Literal["thin", "medium", "large", "strokes", "boxes", "half", "objects"]
_MIXTURES: tuple[MaskSize, ...] = ("thin", "medium", "large")


@dataclass(frozen=True, kw_only=True)
class InpaintingConfig:
    """Which masks training draws, and how often the condition is dropped.

    `thin`, `medium` and `large` are mixtures of strokes and boxes with LaMa's numbers and proportions (large: half and
    half; medium: 10 strokes to 3 boxes; thin: strokes), scaled to the image; where the sample has a semantic map, a
    share `object_share` of them are masks of objects. `strokes` and `boxes` are one of the two, `half` lies on one side
    of a line (as outpainting needs), `objects` are objects of the semantic map only, or boxes if there is none in it.

    `full_mask` is the share of masks that cover everything, as Stable Diffusion's inpainting model was trained with;
    `dropout` is the share of samples that lose the condition, which then is a full mask too.
    """

    masks: MaskKind = "large"
    full_mask: float = 0.25
    object_share: float = 0.25
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.masks not in get_args(MaskKind):
            allowed = ", ".join(get_args(MaskKind))
            raise ValueError(f"masks: found {self.masks!r}; allowed is {allowed}; choose one of these")
        for field, usual in (("full_mask", 0.25), ("object_share", 0.25), ("dropout", 0.1)):
            found = getattr(self, field)
            if not 0 <= found <= 1:
                raise ValueError(f"{field}: found {found}; allowed is 0 to 1; {usual} is usual")


def draw_mask(
    config: InpaintingConfig, height: int, width: int, generator: torch.Generator, semantic: Tensor | None = None
) -> Tensor:
    """One mask as `config` says, float32 [1, H, W] in {0, 1}; a function of the (CPU) generator's state alone.

    `semantic` is the sample's map, int64 [H, W], 255 = unknown. Raises ValueError if it is of another size, or if
    height or width is below 3 pixels.
    """
    if semantic is not None and semantic.shape != (height, width):
        found = " x ".join(map(str, semantic.shape))
        raise ValueError(f"semantic: found a map of {found}; allowed is the mask's size, {height} x {width}")
    full, by_object, by_stroke = uniform(generator, 3)
    if full < config.full_mask:
        return full_mask(height, width)
    kind = config.masks
    if semantic is not None and (kind == "objects" or (kind in _MIXTURES and by_object < config.object_share)):
        mask = object_mask(semantic, generator)
        if mask is not None:
            return mask
    if kind == "half":
        return half_plane_mask(height, width, generator)
    if kind == "strokes":
        return stroke_mask(height, width, generator)
    if kind == "boxes" or kind == "objects":
        return box_mask(height, width, generator)
    return (stroke_mask if by_stroke < BRUSHES[kind].stroke_share else box_mask)(height, width, generator, kind)


def mask_to_latents(masks: Tensor, height: int, width: int) -> Tensor:
    """Masks [B, 1, H, W] at latent size, [B, 1, h, w]: the share of each cell that is to be repainted.

    The exact area mean, so that a stroke of one pixel still counts (nearest-neighbour would lose most of it).
    """
    return area_mean(masks, height, width)


def masked_image(images: Tensor, masks: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] with a grey (0) hole where the mask [B, 1, H, W] is 0.5 or more.

    The same as Stable Diffusion's inpainting: image * (mask < 0.5).
    """
    return images.masked_fill(masks >= 0.5, 0.0)
