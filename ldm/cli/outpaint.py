"""Extend a picture beyond its borders. Every pixel of the old part keeps its bytes."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli.drawing import Picture, open_model
from ldm.cli.masked import add_mask_arguments, mask_options
from ldm.cli.options import (
    add_condition_arguments,
    add_count_argument,
    add_drawing_arguments,
    add_model_argument,
    check_at_least,
    check_conditions,
    check_options,
    check_seeds,
    open_picture,
    printable,
)
from ldm.cli.saving import draw_numbered, write_grid

SIDES = ("left", "top", "right", "bottom")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm outpaint`."""
    add_model_argument(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the picture, of any size")
    for side in SIDES:
        parser.add_argument(f"--{side}", type=int, default=0, metavar="PX", help=f"pixels to add at the {side}")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what the whole picture shows")
    add_condition_arguments(parser)
    add_mask_arguments(parser)
    add_count_argument(parser)
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Extend the canvas and inpaint what is new."""
    check_at_least(arguments, 1, "count")
    check_at_least(arguments, 0, *SIDES)
    conditions, facts = check_conditions(arguments)
    inpainting, mask_facts = mask_options(arguments)
    sides = {side: getattr(arguments, side) for side in SIDES}
    facts |= {f"Outpainting {side}": amount for side, amount in sides.items() if amount} | mask_facts
    options = check_options(arguments, facts=facts, strength=arguments.strength, inpainting=inpainting)
    seeds = check_seeds(arguments.seed, arguments.count)

    from ldm.canvas import extend

    image = open_picture("--image", arguments.image)
    extended, mask = extend(image, **sides)
    inputs = {"image": extended, "mask_image": mask, **conditions}
    source = {"Image": printable(arguments.image.name)}
    pictures = [Picture(prompt=arguments.prompt, seed=seed, inputs=lambda: inputs, facts=source) for seed in seeds]
    images = draw_numbered(open_model(arguments), pictures, options, arguments.out)
    captions = ["picture", *[arguments.prompt or "extended"] * len(images)]
    write_grid([image, *images], captions, None, arguments.out)
