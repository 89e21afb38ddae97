"""The way between prompts, between seeds or between pictures: as a strip, a folder, a GIF or a WebP."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ldm.cli.drawing import Picture, draw, open_model
from ldm.cli.frames import Way, between_images, between_prompts, between_seeds
from ldm.cli.options import (
    add_condition_arguments,
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
from ldm.cli.saving import draw_to_files, next_number, parameters_of
from ldm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

Kind = Literal["prompts", "seeds", "images"]
FORMATS = ("strip", "folder", "gif", "webp")
MOST_FRAMES_PER_SECOND = 50
"""Browsers slow down animations that are faster."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ldm interpolate`."""
    add_model_argument(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to draw; two or more are the points of the way, all drawn from one seed",
    )
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="or: the way leads between these seeds")
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="or: between these pictures, inverted")
    add_condition_arguments(parser)
    parser.add_argument(
        "--frames", type=int, default=8, metavar="N", help="from each point to the next, both included (default: 8)"
    )
    parser.add_argument("--format", choices=FORMATS, default="strip", help="(default: strip)")
    parser.add_argument("--fps", type=float, default=8.0, metavar="N", help="speed of a gif or webp (default: 8)")
    add_size_argument(parser, "the model's own, or the pictures'")
    add_drawing_arguments(parser, steps="30, between pictures 50", guidance="5, between pictures 1")


def run(arguments: argparse.Namespace) -> None:
    """Check, find the points, draw the frames, write."""
    kind = kind_of(arguments)
    check_at_least(arguments, 2, "frames")
    if kind == "images":
        check_at_least(arguments, 2, "steps")  # from one step alone no noise can be told
    if not 1 <= arguments.fps <= MOST_FRAMES_PER_SECOND:
        raise UserError(f"--fps: found {arguments.fps:g}; allowed is 1 to {MOST_FRAMES_PER_SECOND}")
    height, width = parse_size(arguments.size)
    conditions, facts = check_conditions(arguments)
    defaults: dict[str, Any] = {"steps": 50, "guidance": "1"} if kind == "images" else {}
    options = check_options(arguments, facts=facts | {"Interpolation": kind}, **defaults)
    seeds = [check_seeds(seed, 1)[0] for seed in arguments.seeds or [arguments.seed]]
    from ldm.pipeline_request import nearest_side

    sources = open_pictures(arguments) if kind == "images" else []
    pipeline = open_model(arguments)
    if sources and arguments.size is None:
        height, width = (nearest_side(side, pipeline.factor) for side in (sources[0].height, sources[0].width))
    height, width = pipeline.resolve_size(height, width)
    options = replace(options, height=height, width=width)
    way = Way(pipeline, options, conditions, arguments.prompt, seeds, arguments.frames)
    if kind == "images":
        way = replace(way, options=replace(options, scheduler="euler" if pipeline.is_flow else "ddim"))
        pictures = between_images(way, sources, arguments.images)
    else:
        pictures = between_prompts(way) if kind == "prompts" else between_seeds(way)
    write(way, pictures, arguments)


def kind_of(arguments: argparse.Namespace) -> Kind:
    """Between what the way leads; UserError if that is not clear, or there are too few points."""
    counts: dict[Kind, int] = {"images": len(arguments.images or ()), "seeds": len(arguments.seeds or ())}
    given: list[Kind] = [kind for kind, count in counts.items() if count]
    given += ["prompts"] if len(arguments.prompt) > 1 else []
    if len(given) != 1:
        raise UserError(
            f"found {' and '.join(given) or 'nothing'} to go between; "
            "allowed is one of --prompt A --prompt B, --seeds N N, --images FILE FILE"
        )
    kind = given[0]
    if counts.get(kind) == 1:
        raise UserError(f"--{kind}: found 1; allowed is 2 or more; name where the way ends")
    if kind == "seeds" and arguments.seed is not None:
        raise UserError("--seed: found beside --seeds; allowed is one of them; leave --seed out")
    if kind == "images" and arguments.scheduler is not None:
        raise UserError(
            f"--scheduler: found {arguments.scheduler} with --images, which are inverted and drawn along the steps "
            "of ddim (flow: of euler); allowed is none; leave it out"
        )
    return kind


def open_pictures(arguments: argparse.Namespace) -> list[Image.Image]:
    """The pictures of `--images`, of one size unless `--size` makes them so. Raises UserError."""
    pictures = [open_picture("--images", path) for path in arguments.images]
    sizes = {f"{picture.width} x {picture.height}" for picture in pictures}
    if len(sizes) > 1 and arguments.size is None:
        found = " and ".join(sorted(sizes))
        raise UserError(f"--images: found pictures of {found} pixels; allowed is one size; give --size")
    return pictures


def write(way: Way, pictures: Sequence[Picture], arguments: argparse.Namespace) -> None:
    """Draw the frames into OUT/NNNNN-interpolation.png, .gif or .webp, or into a folder of that name."""
    from ldm.picture import save_animation, save_png, strip

    name = f"{next_number(arguments.out):05d}-interpolation"
    if arguments.format == "folder":
        draw_to_files(way.pipeline, pictures, way.options, lambda index: arguments.out / name / f"{index:04d}.png")
        return
    drawn: dict[int, Image.Image] = {}
    draw(way.pipeline, pictures, way.options, drawn.__setitem__)
    frames = [drawn[index] for index in range(len(pictures))]
    facts = {**pictures[0].facts, "Frame": f"{len(frames)} frames"}
    parameters = parameters_of(way.pipeline, replace(pictures[0], facts=facts), frames[0].size, way.options)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{name}.{'png' if arguments.format == 'strip' else arguments.format}"
    if arguments.format == "strip":
        save_png(strip(frames), path, parameters)
    else:
        save_animation(frames, path, arguments.format, arguments.fps, parameters)
    print(printable(str(path)))
