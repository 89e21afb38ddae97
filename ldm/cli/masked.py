"""The options of inpainting and outpainting."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ldm.cli.options import check_at_least
from ldm.errors import user_input

if TYPE_CHECKING:
    from ldm.canvas import InpaintingOptions

FILLS = {"original": "original", "blur": "fill", "grey": "latent nothing", "noise": "latent noise"}
"""What stands in the hole at the start, and AUTOMATIC1111's name for it in PNG files."""


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """How the mask is used."""
    parser.add_argument(
        "--strength", type=float, default=1.0, metavar="S", help="share of the steps, up to 1: all anew (default: 1)"
    )
    parser.add_argument(
        "--feather", type=int, default=0, metavar="PX", help="fade in over so many pixels, inwards only (default: 0)"
    )
    parser.add_argument(
        "--no-blend",
        action="store_true",
        help="a model that was trained with masks: do not hold the latents outside the mask (as diffusers)",
    )
    parser.add_argument("--fill", choices=tuple(FILLS), default="original", help="what stands in the hole at the start")


def mask_options(
    arguments: argparse.Namespace, dilate: int = 0, crop_padding: int | None = None
) -> tuple[InpaintingOptions, dict[str, object]]:
    """The options, and what of them is written into the file, by AUTOMATIC1111's names. Raises UserError."""
    from ldm.canvas import InpaintingOptions

    check_at_least(arguments, 0, "feather")
    with user_input("mask", ValueError):
        options = InpaintingOptions(
            dilate=dilate,
            feather=arguments.feather,
            crop_padding=crop_padding,
            fill=arguments.fill,
            blend=not arguments.no_blend,
        )
    facts: dict[str, object] = {}
    if dilate:
        facts["Mask dilation"] = dilate
    if arguments.feather:
        facts["Mask blur"] = arguments.feather
    if arguments.fill != "original":
        facts["Masked content"] = FILLS[arguments.fill]
    if crop_padding is not None:
        facts |= {"Inpaint area": "Only masked", "Masked area padding": crop_padding}
    return options, facts
