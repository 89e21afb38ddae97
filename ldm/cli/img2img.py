"""Draw variations of a picture: noise is added to it, as much as the strength says, and taken away again."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from ldm.cli.drawing import Picture, open_model
from ldm.cli.options import (
    add_condition_arguments,
    add_count_argument,
    add_drawing_arguments,
    add_model_argument,
    add_size_argument,
    check_at_least,
    check_conditions,
    check_options,
    check_seeds,
    open_picture,
    parse_size,
    printable,
)
from ldm.cli.saving import draw_numbered, write_grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm img2img`."""
    add_model_argument(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE", help="the picture to start from")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to draw")
    add_condition_arguments(parser)
    parser.add_argument(
        "--strength",
        type=float,
        default=0.8,
        metavar="S",
        help="share of the steps: 0.3 changes textures, 0.8 keeps the outlines at most, 1 nothing (default: 0.8)",
    )
    add_size_argument(parser, "the picture's, rounded to what the model can draw")
    add_count_argument(parser, "variations")
    add_drawing_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draw the variations, and a grid with the picture first."""
    check_at_least(arguments, 1, "count")
    height, width = parse_size(arguments.size)
    inputs, facts = check_conditions(arguments)
    options = check_options(arguments, facts=facts, strength=arguments.strength)
    seeds = check_seeds(arguments.seed, arguments.count)
    image = open_picture("--image", arguments.image)
    pipeline = open_model(arguments)
    if arguments.size is not None:
        height, width = pipeline.resolve_size(height, width)
        options = replace(options, height=height, width=width)
    inputs["image"] = image
    source = {"Image": printable(arguments.image.name)}
    pictures = [Picture(prompt=arguments.prompt, seed=seed, inputs=lambda: inputs, facts=source) for seed in seeds]
    images = draw_numbered(pipeline, pictures, options, arguments.out)
    captions = ["picture", *[arguments.prompt or f"strength {arguments.strength:g}"] * len(images)]
    write_grid([image.resize(images[0].size), *images], captions, None, arguments.out)
